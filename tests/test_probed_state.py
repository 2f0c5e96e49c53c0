"""torch.distributed.checkpoint probes an optimizer before it saves or loads: nothing of the probe may stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from saved_optimizers import BF16, give, train

import triton_optim as to
from triton_optim.spec import averages

# A probe of a fresh optimizer.

PROBED: dict[str, dict[str, Any]] = {
    "master": {"param_precision": "master"},
    "kahan int8": {"param_precision": "kahan", "state_dtype": "int8"},
    "split24 int4 average": {"param_precision": "split24", "state_dtype": "int4", "ema_decay": 0.9},
    "split32 average": {"param_precision": "split32", "ema_decay": 0.9, "ema_dtype": BF16},
    "stochastic": {"param_precision": "stochastic", "state_dtype": BF16},
    "master, clipped": {"param_precision": "master", "max_grad_norm": 1.0},
    "master, amp": {"param_precision": "master", "amp": "fused"},
    "master, capturable": {"param_precision": "master", "capturable": True},
}


@pytest.fixture(scope="module")
def dcp() -> Any:
    return pytest.importorskip("torch.distributed.checkpoint.state_dict")


def half_model(device: Any) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 66, device=device, dtype=BF16)


def load_other_weights(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def assert_same_optimizers(one: Any, other: Any) -> None:
    states = [opt.state_dict() for opt in (one, other)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    for group, others in zip(one.param_groups, other.param_groups, strict=True):
        torch.testing.assert_close(group["params"], others["params"], rtol=0, atol=0)


def check_probe(dcp: Any, make: Callable[[Any], Any], device: Any, released: bool = False) -> None:
    probed, plain = half_model(device), half_model(device)
    opt, other = make(probed.parameters()), make(plain.parameters())
    if released:
        for optimizer in (opt, other):
            to.enable_gradient_release(optimizer)
    dcp.get_optimizer_state_dict(probed, opt)
    for model in (probed, plain):
        load_other_weights(model)
    weights = [p.detach().clone() for p in probed.parameters()]
    if any(map(averages, opt.param_groups)):
        with opt.averaged_parameters():
            assert all(map(torch.equal, probed.parameters(), weights))
    for model, optimizer in ((probed, opt), (plain, other)):
        for step in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(device, BF16)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert_same_optimizers(opt, other)


@pytest.mark.parametrize("name", PROBED)
def test_a_probe_leaves_nothing_of_the_weights_that_it_saw(name: str, dcp: Any, device: Any) -> None:
    """torch.distributed.checkpoint makes one; weights that are loaded after it must not be overwritten by others."""
    check_probe(dcp, lambda params: to.AdamW(params, lr=0.01, backend="eager", **PROBED[name]), device)


def test_a_probe_on_every_backend(backend: str, dcp: Any, device: Any) -> None:
    check_probe(dcp, lambda params: to.SGD(params, lr=0.01, momentum=0.9, backend=backend, **PROBED["master"]), device)


@pytest.mark.parametrize("cls", [to.ASGD, to.Rprop, to.Adafactor, to.NAdam])
def test_a_probe_leaves_nothing_of_the_learning_rate_that_it_set(cls: Any, dcp: Any, device: Any) -> None:
    check_probe(dcp, lambda params: cls(params, lr=0.01, backend="eager"), device)


def test_a_probe_with_gradient_release(dcp: Any, device: Any) -> None:
    check_probe(
        dcp, lambda params: to.AdamW(params, lr=0.01, backend="eager", **PROBED["master"]), device, released=True
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_dtypes_are_given_and_saved_by_their_names(dtype: Any, dcp: Any, device: Any) -> None:
    model = half_model(device)
    opt = to.AdamW(model.parameters(), state_dtype=dtype, ema_decay=0.5, ema_dtype=dtype, backend="eager")
    train(list(model.parameters()), opt, range(1))
    assert {opt.param_groups[0][name] for name in ("state_dtype", "ema_dtype")} == {torch.bfloat16}
    assert {opt.state_dict()["param_groups"][0][name] for name in ("state_dtype", "ema_dtype")} == {"bfloat16"}
    assert opt.state[model.weight]["ema"].dtype == torch.bfloat16
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = dcp.get_optimizer_state_dict(model, opt, options=options)
    again = half_model(device)
    other = to.AdamW(again.parameters(), state_dtype="bfloat16", ema_decay=0.5, ema_dtype="bfloat16", backend="eager")
    again.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(again, other, saved, options=options)
    assert_same_optimizers(other, opt)
    opt.param_groups[0]["state_dtype"] = "float32"
    train(list(model.parameters()), opt, range(1, 2))
    assert opt.state[model.weight]["exp_avg"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ["master", "kahan int8", "split24 int4 average", "master, capturable"])
def test_a_checkpoint_goes_into_a_probed_optimizer(name: str, flat: bool, dcp: Any, device: Any, tmp_path: Any) -> None:
    """What torch.distributed.checkpoint writes to disk, read into what it saw in a fresh optimizer."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, fresh = half_model(device), half_model(device)
    opt, other = (to.AdamW(m.parameters(), lr=0.01, backend="eager", **PROBED[name]) for m in (model, fresh))
    train(list(model.parameters()), opt, range(3))
    fresh.load_state_dict(model.state_dict())
    saved = {"optimizer": dcp.get_optimizer_state_dict(model, opt, options=options)}
    torch.distributed.checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    read = {"optimizer": dcp.get_optimizer_state_dict(fresh, other, options=options)}
    torch.distributed.checkpoint.load(read, checkpoint_id=tmp_path, no_dist=True)
    dcp.set_optimizer_state_dict(fresh, other, read["optimizer"], options=options)
    assert_same_optimizers(other, opt)
    for m, optimizer in ((model, opt), (fresh, other)):
        train(list(m.parameters()), optimizer, range(3, 5))
    assert_same_optimizers(other, opt)


def test_what_is_seen_of_a_probed_optimizer_is_of_the_weights_there_are(dcp: Any, device: Any) -> None:
    model = half_model(device)
    opt = to.AdamW(model.parameters(), backend="eager", param_precision="master")
    first = dcp.get_optimizer_state_dict(model, opt)["state"]["weight"]["master"]
    before = first.clone()
    load_other_weights(model)
    assert torch.equal(dcp.get_optimizer_state_dict(model, opt)["state"]["weight"]["master"], model.weight.float())
    assert torch.equal(first, before), "what was handed out is the caller's"
    assert torch.equal(to.master_state_dict(model, opt)["weight"], model.weight.float())
    dcp.get_optimizer_state_dict(model, opt)
    other_model, other = copy.deepcopy((model, opt))
    load_other_weights(other_model)
    assert not other.state
    dcp.get_optimizer_state_dict(model, opt)
    to.load_master_state_dict(model, opt, {n: torch.ones(p.shape) / 3 for n, p in model.named_parameters()})
    give(list(model.parameters()), 0)
    opt.step()
    assert float((to.master_state_dict(model, opt)["weight"] - 1 / 3).abs().max()) < 2e-3


@pytest.mark.parametrize("how", ["in place", "a new tensor", "loaded"])
def test_what_was_written_after_a_probe_stays(how: str, dcp: Any, device: Any) -> None:
    model = half_model(device)
    opt = to.SGD(model.parameters(), lr=1.0, momentum=1.0, backend="eager")
    saved = dcp.get_optimizer_state_dict(model, opt)
    state = opt.state[model.weight]
    if how == "in place":
        state["momentum_buffer"].fill_(2.0)
    elif how == "a new tensor":
        state["momentum_buffer"] = torch.full_like(model.weight, 2.0)
    else:
        saved["state"]["weight"]["momentum_buffer"] = torch.full_like(model.weight, 2.0)
        dcp.set_optimizer_state_dict(model, opt, saved)
    give(list(model.parameters()), 0)
    opt.step()
    assert torch.equal(opt.state[model.weight]["momentum_buffer"], model.weight.grad + 2)
