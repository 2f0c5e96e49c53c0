"""Optimizers that estimate how far the minimum is, from sums over the whole model: what they keep, and when."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import triton_optim

OPTIONS = {name: {"d0": 0.01, "weight_decay": 0.1} for name in ("Prodigy", "DAdaptAdam", "DAdaptSGD", "DAdaptLion")}
OPTIONS["Prodigy sampled"] = OPTIONS["Prodigy"] | {"slice_p": 3}
each_kind = pytest.mark.parametrize("name", OPTIONS)


def model(name: str, backend: str, **options: Any) -> tuple[list[Parameter], Any]:
    """Parameters in two groups, with their optimizer."""
    random = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=random)) for shape in ((4, 3), (1030,), ())]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    return params, class_of(name)(groups, backend=backend, **OPTIONS[name] | options)


def class_of(name: str) -> Any:
    return getattr(triton_optim, name.partition(" ")[0])


def run(params: list[Parameter], optimizer: Any, steps: range, without: int | None = None) -> None:
    for number in steps:
        random = torch.Generator().manual_seed(number)
        for i, p in enumerate(params):
            p.grad = None if i == without else 1 + 0.1 * torch.randn(p.shape, generator=random)  # they agree
        optimizer.step()


def numbers(optimizer: Any, p: Parameter) -> list[float]:
    return [optimizer.state[p][name].item() for name in optimizer.numbers_of_model]


def contents(params: list[Parameter], optimizer: Any) -> list[Any]:
    """All that a step may change."""
    states = [{name: value.tolist() for name, value in optimizer.state[p].items()} for p in params]
    return [[p.tolist() for p in params], states]


@each_kind
def test_the_numbers_of_the_model_are_the_same_everywhere(name: str, backend: str) -> None:
    params, optimizer = model(name, backend)
    assert optimizer.d.item() == 0.01
    run(params, optimizer, range(6), without=1)  # which joins later
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    before = optimizer.d.item()
    assert before > 0.01
    run(params, optimizer, range(6, 7))
    assert optimizer.d.item() >= before
    run(params, optimizer, range(7, 14), without=0)
    assert optimizer.d.item() > before
    assert numbers(optimizer, params[0]) == numbers(optimizer, params[1]) == numbers(optimizer, params[2])
    assert optimizer.d.shape == ()


@each_kind
def test_they_are_those_of_the_eager_backend(name: str, backend: str) -> None:
    ends = []
    for which in (backend, "eager"):
        params, optimizer = model(name, which)
        run(params, optimizer, range(6))
        ends.append([torch.tensor(numbers(optimizer, params[0])), *(p.detach() for p in params)])
    for found, wanted in zip(*ends, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each_kind
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"state_dtype": "int8"}], ids=str)
def test_a_run_is_resumed_exactly(name: str, options: dict[str, Any]) -> None:
    params, optimizer = model(name, "eager", **options)
    run(params, optimizer, range(5))
    copied, twin = copy.deepcopy((params, optimizer))
    others, fresh = model(name, "eager", **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    for own, its in ((params, optimizer), (others, fresh), (copied, twin)):
        run(own, its, range(5, 9))
    assert contents(params, optimizer) == contents(others, fresh) == contents(copied, twin)


@each_kind
def test_no_gradients_change_nothing(name: str, backend: str) -> None:
    params, optimizer = model(name, backend)
    run(params, optimizer, range(3))
    before = contents(params, optimizer)
    for p in params:
        p.grad = None
    optimizer.step()
    assert contents(params, optimizer) == before


@each_kind
@pytest.mark.parametrize("amp", ["fused", None])
def test_a_skipped_step_changes_nothing(name: str, amp: str | None, backend: str) -> None:
    params, optimizer = model(name, backend, amp=amp)
    run(params, optimizer, range(3))
    before = contents(params, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros((), requires_grad=True))  # it is lazy
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    params[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert contents(params, optimizer) == before


@each_kind
def test_gradients_of_zeros_estimate_nothing(name: str) -> None:
    params, optimizer = model(name, "eager", weight_decay=0.0)
    start = [p.detach().clone() for p in params]
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.d.item() == 0.01
    assert all(map(torch.equal, start, params))


@each_kind
def test_a_group_whose_rate_is_0_stands_still(name: str) -> None:
    params, optimizer = model(name, "eager")
    run(params, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.0
    still = {name: t.clone() for name, t in optimizer.state[params[0]].items() if t.dim()}
    p, before = params[0].detach().clone(), optimizer.d.item()
    run(params, optimizer, range(3, 9))
    assert torch.equal(p, params[0])
    assert all(torch.equal(t, optimizer.state[params[0]][name]) for name, t in still.items())
    assert optimizer.d.item() != before


@each_kind
def test_gradients_can_not_be_released(name: str) -> None:
    _, optimizer = model(name, "eager")
    with pytest.raises(RuntimeError, match="needs the gradients of all"):
        triton_optim.enable_gradient_release(optimizer)


@each_kind
def test_numbers_are_written_where_they_lie(name: str, backend: str) -> None:
    """As replays of a captured graph must find them."""
    params, optimizer = model(name, backend, capturable=True)
    run(params, optimizer, range(1))
    held = {which: optimizer.state[params[0]][which] for which in optimizer.numbers_of_model if which != "g0_norm"}
    before = {which: t.item() for which, t in held.items()}
    run(params, optimizer, range(1, 7))
    assert all(optimizer.state[params[0]][which] is t for which, t in held.items())
    assert all(t.item() != before[which] for which, t in held.items())


@each_kind
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"d0": 0.0}, "Invalid d0 value: 0.0. It must be positive"),
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"growth_rate": 0.5}, "Invalid growth_rate: 0.5. It must be at least 1"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value"),
        ({"slice_p": 0}, "Invalid slice_p value: 0. It must be an int of 1 or more"),
        ({"slice_p": 1.5}, "Invalid slice_p value: 1.5"),
    ],
    ids=lambda x: str(x)[:12],
)
def test_out_of_range(name: str, option: dict[str, Any], message: str) -> None:
    if not option.keys() <= class_of(name)([Parameter(torch.ones(1))]).defaults.keys():
        pytest.skip(f"{name} has no such option")
    with pytest.raises(ValueError, match=message):
        class_of(name)([Parameter(torch.ones(1))], **option)


@pytest.mark.parametrize("precision", ["kahan", "split32", "master"])
def test_samples_are_of_exact_parameters(precision: str, backend: str) -> None:
    """In bfloat16 itself nothing would have moved."""
    p = Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = triton_optim.Prodigy([p], slice_p=7, d0=1e-4, param_precision=precision, backend=backend)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert bool((p == 1).all())
    assert numbers(optimizer, p)[2] > 0


def test_samples_take_a_share_of_the_memory() -> None:
    p = Parameter(torch.ones(10, 11, dtype=torch.bfloat16))
    optimizer = triton_optim.Prodigy([p], slice_p=11, state_dtype="int8", backend="eager")
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p]
    assert [state[name].nbytes for name in ("s_sampled", "p0_sampled")] == [40, 40]
    assert not {"s", "p0"} & state.keys()
    report = triton_optim.memory_report(optimizer).states
    assert report["s_sampled"] == report["p0_sampled"] == 40


def test_samples_of_another_number_are_refused() -> None:
    params, optimizer = model("Prodigy sampled", "eager")
    run(params, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["slice_p"] = 2
    _, fresh = model("Prodigy sampled", "eager")
    with pytest.raises(RuntimeError, match=r"s_sampled of parameter 0 has shape \(4,\).*it is \(6,\)"):
        fresh.load_state_dict(saved)
