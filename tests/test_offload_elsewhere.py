"""Offloaded steps of parameters on another device than the CPU: on one whose tensors no operation of the CPU takes.

With the mark ``compiled`` the file has a process of its own, as torch has the device for good.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import CPP
from elsewhere import elsewhere
from offloading import BF16, CASES, F32, everything, give, made, params_of, resumed, train, trained
from sharding import playing
from side_by_side import assert_equal
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import triton_optim as to
from triton_optim.backends.cpp import chunks
from triton_optim.util.layout import local

pytestmark = [CPP, pytest.mark.compiled]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is several, as one of millions of elements is."""
    monkeypatch.setattr(chunks, "STRETCH", chunks.CHUNK)


FEW = ["AdamW", "complex", "int8", "master", "everything", "measured", "before the rule", "made before"]


@pytest.mark.parametrize(("cls", "dtype", "options"), [CASES[name] for name in FEW], ids=FEW)
def test_steps_of_another_device_are_those_of_the_cpu(cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """All that is computed is computed on the host, but for the norm."""
    options = {"backend": "cpp"} | options
    here = trained(cls, made(dtype), **options)
    there = trained(cls, made(dtype, elsewhere()), offload="cpu", **options)
    assert {p.device for p in params_of(there)} == {elsewhere()}
    states = [value for state in there.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert {value.device.type for value in states} <= {"cpu"}
    # The norm of the device is another sum of the same squares: its last bits may differ, and one rounding with them.
    close = {"rtol": 1e-2, "atol": 1e-2} if "max_grad_norm" in options else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(everything(there), everything(here), **close)


@pytest.mark.parametrize("saved_where", [None, "cpu"])
def test_training_resumes_with_and_without(saved_where: str | None) -> None:
    # What is not offloaded is eager here, whose root may be rounded otherwise.
    torch.testing.assert_close(*resumed(elsewhere(), saved_where), rtol=1e-2, atol=1e-4)


def test_a_group_may_be_offloaded_later_or_no_more() -> None:
    where = elsewhere()
    plain = trained(to.SGD, made(F32, where), lr=0.1, momentum=0.9, steps=8)
    params = made(F32, where)
    opt = to.SGD([{"params": params[:2]}, {"params": params[2:], "offload": "cpu"}], lr=0.1, momentum=0.9)
    train(opt, range(2))
    opt.param_groups[0]["offload"] = "cpu"
    train(opt, range(2, 5))
    assert opt.state[params[0]]["momentum_buffer"].device.type == "cpu"
    for group in opt.param_groups:
        group["offload"] = None
    train(opt, range(5, 8))
    assert opt.state[params[3]]["momentum_buffer"].device == where
    torch.testing.assert_close(everything(opt), everything(plain))


def test_averages_evaluation_and_float32_weights_of_another_device() -> None:
    def used(device: Any, where: str | None) -> list[Tensor]:
        params, free = made(BF16, device), made(F32, device)
        opt = to.AdamW(params, lr=0.1, offload=where, ema_decay=0.5, param_precision="split32", backend="cpp")
        train(opt, range(3))
        with opt.averaged_parameters():
            found = [p.detach().cpu().clone() for p in params]
        two = to.ScheduleFreeAdamW(free, lr=0.1, offload=where, backend="cpp")
        train(two, range(3))
        two.eval()
        found += [p.detach().cpu().clone() for p in free]
        two.train()
        model = torch.nn.ParameterList(params)
        weights = to.master_state_dict(model, opt)
        found += [w.cpu() for w in weights.values()]
        to.load_master_state_dict(model, opt, {name: w * 2 for name, w in weights.items()})
        own = to.to_torch_state_dict(opt)["state"]
        found += [state["exp_avg"].cpu().clone() for state in own.values()]
        return [*found, *everything(train(opt, range(3, 5))), *everything(train(two, range(3, 5)))]

    assert_equal(used(elsewhere(), "cpu"), used("cpu", None))


def test_states_move_to_the_host_and_back() -> None:
    where = elsewhere()
    opts = [to.AdamW(made(F32, where), lr=0.1, backend="eager", ema_decay=0.5) for _ in range(2)]
    for opt in opts:
        train(opt, range(2))
    still, opt = opts
    saved = opt.state_dict()["state"]
    opt.offload_states()
    tensors = [t for state in opt.state.values() for name, t in state.items() if t.dim()]
    assert {t.device.type for t in tensors} == {"cpu"}
    assert opt.engine.plan is None  # which held them
    torch.testing.assert_close(opt.state_dict()["state"], saved, rtol=0, atol=0, check_device=False)
    copied = copy.deepcopy(opt)
    opt.load_states()
    assert {t.device for state in opt.state.values() for t in state.values() if t.dim()} == {where}
    opt.offload_states()
    for each_one in (still, opt, copied):  # a step brings them back
        train(each_one, range(2, 4))
        assert each_one.state[params_of(each_one)[0]]["ema"].device == where
        assert_equal(everything(each_one), everything(still))
    opt.offload_states()
    opt.load_state_dict(saved_whole := still.state_dict())
    assert opt.state[params_of(opt)[0]]["exp_avg"].device == where
    assert saved_whole["state"][0]["exp_avg"].device == where


def test_states_that_parameters_share_move_once() -> None:
    params = made(F32, elsewhere())
    opt = trained(to.SGD, params, lr=0.1, momentum=0.9)
    for state in opt.state.values():
        state["momentum_buffer"] = opt.state[params[0]]["momentum_buffer"]
    for move in (opt.offload_states, opt.load_states):
        move()
        assert len({id(state["momentum_buffer"]) for state in opt.state.values()}) == 1


def placed(mesh: Any, value: Tensor) -> Any:
    """A rank's part of a tensor, on another device than the mesh is said to be of."""
    own = torch.empty_like(DTensor.from_local(value.to("meta"), mesh, [Shard(0)], run_check=False), device=value.device)
    own._local_tensor.copy_(value)
    return own


def test_sharded_parameters_of_another_device() -> None:
    options = {"lr": 0.1, "ema_decay": 0.5, "param_precision": "split32"}
    params = made(BF16)[:2]
    plain = to.AdamW(params, backend="cpp", **options)
    with playing(1, torch.device("cuda")) as mesh:
        away = [Parameter(placed(mesh, p.detach().to(elsewhere()))) for p in params]
        opt = to.AdamW(away, offload="cpu", **options)
        for k in range(3):
            give(params, k)
            for p, q in zip(params, away, strict=True):
                q.grad = placed(mesh, p.grad.to(elsewhere()))
            plain.step()
            opt.step()
        for p, q in zip(params, away, strict=True):
            assert_equal([q._local_tensor.cpu()], [p.detach()])
            state = opt.state[q]
            assert {local(value).device.type for value in state.values()} == {"cpu"}
            for name, value in plain.state[p].items():
                assert_equal([local(state[name])], [value])
