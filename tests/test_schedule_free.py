"""Schedule-Free's two places: `train()` and `eval()`. What a step does is tested by the rows."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from complaints import explains
from conftest import BACKENDS
from sharding import playing, sharded
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.nn import Parameter

import triton_optim as to

BF16 = torch.bfloat16
BETA = 0.75
CLASSES: dict[type[Any], dict[str, Any]] = {
    to.ScheduleFreeAdamW: {"lr": 0.02, "betas": (BETA, 0.9), "weight_decay": 0.1, "warmup_steps": 4},
    to.ScheduleFreeSGD: {"lr": 0.1, "momentum": BETA, "weight_decay": 0.1, "warmup_steps": 4},
    to.ScheduleFreeRAdam: {"lr": 0.02, "betas": (BETA, 0.9), "weight_decay": 0.1},
}
each_class = pytest.mark.parametrize("cls", CLASSES)


def parameters(device: torch.device, dtype: torch.dtype = torch.float32, *shapes: tuple[int, ...]) -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=random).to(device, dtype)) for s in shapes or ((4, 3), (5,), (0, 2))]


def train(opt: Any, steps: Any, missing: int | None = None) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.randn(p.shape, generator=random).to(p)
        opt.step()


def values(params: list[Any]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def made(cls: Any, params: Any, **options: Any) -> Any:
    return cls(params, **CLASSES[cls], **options)


@pytest.mark.parametrize(
    ("cls", "backend"),
    [
        *((cls, "eager") for cls in CLASSES),
        *(pytest.param(next(iter(CLASSES)), *b.values, marks=b.marks) for b in BACKENDS[1:]),
    ],
)
def test_eval_is_at_the_mean_of_all_z(cls: Any, backend: str, device: torch.device) -> None:
    """The paper's x, which nothing else here keeps: the weighted mean of the points that z came to."""
    params = parameters(device, torch.float64)
    opt = made(cls, params, backend=backend)
    mean, total = [np.zeros(tuple(p.shape)) for p in params], 0.0
    for step in range(12):
        train(opt, [step])
        z = [opt.state[p]["z"].cpu().numpy() for p in params]
        weight = float(opt.state[params[0]]["weight_sum"]) - total
        total += weight
        for x, point in zip(mean, z, strict=True):
            x += weight * point
        y = values(params)
        opt.eval()
        for p, x, before in zip(params, mean, y, strict=True):
            wanted = torch.from_numpy(x / total) if total else before.cpu()  # RAdam has not moved yet
            torch.testing.assert_close(p.detach().cpu(), wanted, rtol=1e-6, atol=1e-7)
        opt.train()
        torch.testing.assert_close(values(params), y, rtol=1e-12, atol=1e-13)
    assert total > 0


@each_class
def test_the_modes_are_entered_once(cls: Any, device: torch.device) -> None:
    params = parameters(device)
    opt = made(cls, params, backend="eager")
    start = values(params)
    opt.train()
    opt.eval()
    opt.train()
    assert all(map(torch.equal, params, start))  # there are no states yet
    assert not opt.state
    train(opt, range(8), missing=1)
    y = values(params)
    opt.train()
    assert all(map(torch.equal, params, y))
    opt.eval()
    x = values(params)
    assert not torch.equal(x[0], y[0])
    assert torch.equal(x[1], start[1])
    opt.eval()
    assert all(map(torch.equal, params, x))


@each_class
def test_a_step_in_evaluation_mode_says_what_to_call(cls: Any, device: torch.device) -> None:
    params = parameters(device)
    opt = made(cls, params, backend="eager")
    train(opt, range(2))
    opt.eval()
    x = values(params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="evaluation mode") as error:
            train(opt, [2])
        explains(error, cls.__name__, "train()")
    assert all(map(torch.equal, params, x))
    assert {float(opt.state[p]["step"]) for p in params} == {2.0}
    opt.train()
    train(opt, [2])


def test_the_other_errors(device: torch.device) -> None:
    p = Parameter(torch.ones(2, device=device))
    for wrong in ({"betas": (0.0, 0.9)}, {"betas": (1.0, 0.9)}, {"warmup_steps": -1}, {"r": -1.0}):
        with pytest.raises(ValueError, match="Invalid") as error:
            to.ScheduleFreeAdamW([p], **wrong)
        explains(error)
    for momentum in (0.0, 1.0):
        with pytest.raises(ValueError, match="Invalid momentum") as error:
            to.ScheduleFreeSGD([p], momentum=momentum)
        explains(error, momentum)
    opt = to.ScheduleFreeSGD([p], ema_decay=0.9, backend="eager")
    train(opt, range(2))
    with opt.averaged_parameters(), pytest.raises(RuntimeError, match=r"eval\(\) inside") as error:
        opt.eval()
    explains(error)


@pytest.mark.parametrize("precision", ["storage", "stochastic", "kahan", "split24", "split32", "master"])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, BF16, "int8"], ids=str)
def test_every_precision_of_parameter_and_state(precision: Any, state_dtype: Any, device: torch.device) -> None:
    """Moved there and back, a parameter is what it was but for what its codec rounds."""
    params = parameters(device, BF16, (64, 80), (5,))
    opt = made(to.ScheduleFreeAdamW, params, param_precision=precision, state_dtype=state_dtype, backend="eager")
    train(opt, range(3))
    model = torch.nn.ParameterList(params)
    before = to.master_state_dict(model, opt)
    opt.eval()
    inside = to.master_state_dict(model, opt)
    opt.train()
    after = to.master_state_dict(model, opt)
    bits = {"storage": 8, "stochastic": 8, "kahan": 15, "split24": 15, "split32": 23, "master": 23}[precision]
    for (name, y), p in zip(before.items(), params, strict=True):
        z = opt.state[p]["z"].float()
        assert z.shape == p.shape  # in no codes
        tolerance = {"rtol": 0, "atol": 2.0**-bits * 4 * float(y.abs().max())}
        torch.testing.assert_close(inside[name], torch.lerp(y, z, 1 - 1 / BETA), **tolerance)
        torch.testing.assert_close(after[name], y, **tolerance)
        assert not torch.equal(inside[name], y)


def test_the_state_starts_as_what_the_parameter_is(device: torch.device) -> None:
    """With its corrections, where they are there before the first step."""
    p = Parameter(torch.zeros(64, 64, dtype=BF16, device=device))
    model = torch.nn.ParameterList([p])
    exact = torch.full((64, 64), 1.001, device=device)
    opt = to.ScheduleFreeSGD([p], lr=0.0, param_precision="master", state_dtype=torch.float32, backend="eager")
    to.load_master_state_dict(model, opt, {"0": exact})
    train(opt, [0])
    assert torch.equal(opt.state[p]["z"], exact)


@each_class
@pytest.mark.parametrize("how", ["state dict", "copy"])
def test_a_checkpoint_in_evaluation_mode_goes_on_from_there(cls: Any, how: str, device: torch.device) -> None:
    params = parameters(device)
    opt = made(cls, params, backend="eager")
    train(opt, range(7))
    opt.eval()
    if how == "copy":
        resumed, other = copy.deepcopy((params, opt))
    else:
        file = io.BytesIO()
        torch.save((values(params), opt.state_dict()), file)
        file.seek(0)
        saved, state = torch.load(file)
        resumed = [Parameter(p) for p in saved]
        other = made(cls, resumed, backend="eager")
        other.load_state_dict(state)
    other.eval()  # it is
    assert all(map(torch.equal, resumed, params))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        train(other, [7])
    for each in (opt, other):
        each.train()
        train(each, range(7, 10))
    assert all(map(torch.equal, resumed, params))


def test_groups_have_modes_of_their_own(device: torch.device) -> None:
    """One that comes in evaluation mode trains, and is left alone by train()."""
    params = parameters(device)
    opt = made(to.ScheduleFreeSGD, params[:1], backend="eager")
    train(opt, range(6))
    y = values(params)
    opt.eval()
    opt.add_param_group({"params": params[1:], "momentum": 0.5})
    assert [group["train_mode"] for group in opt.param_groups] == [False, True]
    with pytest.raises(RuntimeError, match="evaluation mode"):
        train(opt, [6])
    opt.train()
    torch.testing.assert_close(values(params), y)
    train(opt, [6, 7])
    z, y = [opt.state[p]["z"].clone() for p in params], values(params)
    opt.eval()
    for i, beta in enumerate((BETA, 0.5, 0.5)):
        torch.testing.assert_close(params[i].detach(), torch.lerp(y[i], z[i], 1 - 1 / beta))


def test_modes_launch_little(device: torch.device) -> None:
    """Whatever the number of the parameters, of which one is listed twice."""
    params = parameters(device, torch.float32, *[(3, 2)] * 20)
    with pytest.warns(UserWarning, match="duplicate"):
        opt = made(to.ScheduleFreeSGD, [*params, params[0]], backend="eager")
    train(opt, range(5))
    y, z = values(params), [opt.state[p]["z"].clone() for p in params]
    with torch.profiler.profile() as profile:
        opt.eval()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_foreach_lerp_"] == 1
    for p, *ends in zip(params, y, z, strict=True):
        torch.testing.assert_close(p.detach(), torch.lerp(*ends, 1 - 1 / BETA))


def test_complex_and_strided_parameters(device: torch.device) -> None:
    wide = torch.randn(4, 6, device=device)
    params = [Parameter(torch.randn(3, dtype=torch.complex64, device=device)), Parameter(wide[:, ::2])]
    opt = made(to.ScheduleFreeSGD, params, backend="eager")
    train(opt, range(5))
    y, z = values(params), [opt.state[p]["z"].clone() for p in params]
    opt.eval()
    for p, start, end in zip(params, y, z, strict=True):
        torch.testing.assert_close(p.detach(), start + (1 - 1 / BETA) * (end - start))
    opt.train()
    torch.testing.assert_close(values(params), y)


def test_sharded_parameters(device: torch.device) -> None:
    full = torch.randn(5, 6, device=device)
    with playing(1, device) as mesh:
        p, own = Parameter(sharded(full, mesh, [Shard(0)])), Parameter(full[2:4].clone())
        ends = []
        for each in (p, own):
            opt = made(to.ScheduleFreeAdamW, [each], backend="eager")
            for step in range(5):
                g = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(device)
                each.grad = sharded(g, mesh, [Shard(0)]) if each is p else g[2:4].clone()
                opt.step()
            opt.eval()
            ends.append(each.detach())
        assert torch.equal(ends[0].to_local(), ends[1])


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[-1]])
@pytest.mark.parametrize("options", [{"capturable": True}, {"ema_decay": 0.9}, {"max_grad_norm": 1.0}], ids=str)
def test_with_other_options(options: dict[str, Any], backend: str, device: torch.device) -> None:
    """A training that is evaluated in between ends where one ends that is not."""
    ends = []
    for evaluates in (False, True):
        params = parameters(device)
        opt = made(to.ScheduleFreeAdamW, params, **options, backend=backend)
        for step in range(6):
            train(opt, [step])
            if evaluates:
                opt.eval()
                opt.train()
        ends.append(values(params))
    torch.testing.assert_close(*ends)


def test_sums_of_weights_do_not_stand_still(device: torch.device) -> None:
    """In float32 a million small weights are not what they are together."""
    p = Parameter(torch.ones(2, device=device))
    opt = to.ScheduleFreeSGD([p], lr=0.1, backend="eager")
    train(opt, [0])
    opt.state[p]["weight_sum"].fill_(1e6)
    train(opt, [1])
    assert float(opt.state[p]["weight_sum"]) == pytest.approx(1e6 + 0.01, rel=1e-12)
    assert opt.state_dict()["state"][0]["weight_sum"].dtype == torch.float64
