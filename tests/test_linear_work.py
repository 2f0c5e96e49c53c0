"""Saving, loading, copying and making an optimizer: of four times as many parameters four times the work."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Module, Parameter, ParameterList
from torch.optim import Optimizer

import triton_optim

MOST = 4.4  # times the work of a quarter of the parameters
KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"momentum": 0.9},
    "capturable": {"capturable": True},
    "ema": {"ema_decay": 0.9},
    "kept": {"param_precision": "split24", "state_dtype": torch.bfloat16},
    "int8": {"state_dtype": "int8"},
    "groups": {},
}
WORKS: dict[str, Callable[[Any, Any], Any]] = {
    "state_dict": lambda opt, saved: opt.state_dict(),
    "load_state_dict": lambda opt, saved: opt.load_state_dict(saved),
    "copy": lambda opt, saved: opt.__setstate__(opt.__getstate__()),
    "to torch": lambda opt, saved: triton_optim.to_torch_state_dict(opt),
    "from torch": lambda opt, saved: triton_optim.load_torch_state_dict(opt, saved),
}


def sizes(kind: str) -> tuple[int, int]:
    return (100, 400) if kind in ("groups", "int8") else (1000, 4000)


def calls(work: Callable[..., Any], *args: Any) -> int:
    """How many Python functions it calls, and how many steps of generators it takes."""
    seen = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal seen
        seen += event == "call"

    work(*args)  # what is done once a process
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work(*args)
    finally:
        sys.setprofile(before)
    return seen


def made(kind: str, count: int) -> Any:
    """An optimizer of so many parameters, a group for each if they are to have one, with states as a step leaves them.

    All lie in the same memory, which no step is made in.
    """
    cls, options = triton_optim.SGD if kind == "SGD" else triton_optim.AdamW, KINDS[kind]
    size = 4096 if kind == "int8" else 4  # fewer are not quantized
    first = Parameter(torch.zeros(size, dtype=torch.bfloat16 if kind == "kept" else torch.float32))
    first.grad = torch.ones_like(first)
    one = cls([first], backend="eager", **options)
    one.step()
    params = [Parameter(first.detach()) for _ in range(count)]
    opt = cls([{"params": [p]} for p in params] if kind == "groups" else params, backend="eager", **options)
    for p in params:
        opt.state[p].update({name: value if value.dim() else value.clone() for name, value in one.state[first].items()})
    return opt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", WORKS)
def test_saving_and_loading(work: str, kind: str) -> None:
    if kind not in ("AdamW", "int8", "groups") and "torch" in work:
        pytest.skip("what leads to and from torch asks for the same of this kind as of AdamW")
    needed = []
    for count in sizes(kind):
        opt = made(kind, count)
        needed.append(calls(WORKS[work], opt, opt.state_dict()))
    assert needed[1] <= MOST * needed[0], needed


def test_loading_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Module, "load_state_dict", lambda *_: None)  # torch's own work is not looked at
    needed = []
    for count in (250, 1000):
        opt = made("kept", count)
        model = ParameterList(opt.param_groups[0]["params"])
        weights = {name: p.detach().float() for name, p in model.named_parameters()}
        needed.append(calls(triton_optim.load_master_state_dict, model, opt, weights))
    assert needed[1] <= MOST * needed[0], needed


@pytest.mark.parametrize("kind", KINDS)
def test_torch_does_not_look_for_the_parameter_of_each_value(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through all groups for it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch looked for it")

    monkeypatch.setattr(Optimizer, "_process_value_according_to_param_policy", staticmethod(refuse))
    opt = made(kind, 2)
    opt.load_state_dict(opt.state_dict())


def parameters(count: int) -> list[Parameter]:
    return [Parameter(torch.zeros(2)) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"ema_decay": 0.9}], ids=["plain", "int8", "ema"])
def test_an_optimizer_is_made_with_no_call_for_each_parameter(options: dict[str, Any]) -> None:
    few, many = (
        calls(partial(triton_optim.AdamW, params, **options)) - calls(torch.optim.AdamW, params)
        for params in map(parameters, (1000, 4000))
    )
    assert many - few < 100


def test_a_group_is_added_with_no_look_at_the_others() -> None:
    def add_each(cls: Any, params: list[Parameter]) -> None:
        opt = cls(params[:1])
        for p in params[1:]:
            opt.add_param_group({"params": [p]})

    few, many = (
        calls(add_each, triton_optim.SGD, params) - calls(add_each, torch.optim.SGD, params)
        for params in map(parameters, (100, 400))
    )
    assert many <= MOST * few


@pytest.mark.parametrize(
    ("odd", "error"),
    [
        (lambda: torch.zeros(2, dtype=torch.int64), "parameter 2 is torch.int64"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "cannot run torch.complex64 parameters"),
        (lambda: torch.zeros(2, device="meta"), "cannot run torch.float32 parameters on meta"),
        (lambda: torch.zeros(2, 4)[:, ::2], "a view with gaps"),
        (lambda: torch.zeros(1).expand(2), "overlap in memory"),
    ],
    ids=["integers", "complex", "meta", "gaps", "overlaps"],
)
def test_a_parameter_that_is_unlike_the_first_is_checked(odd: Callable[[], torch.Tensor], error: str) -> None:
    other = Parameter(odd(), requires_grad=False)
    with pytest.raises(RuntimeError, match=error):
        triton_optim.AdamW([*parameters(2), other, *parameters(2)], backend="cpp")
    with pytest.raises(RuntimeError, match=error):
        triton_optim.AdamW([Parameter(torch.zeros(3, 2).t()), *parameters(1), other], backend="cpp")
