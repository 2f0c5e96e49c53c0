"""A kernel that cannot be compiled, loaded or started: an error that names it, or one warning and the next backend."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
import triton.language as tl
from torch.nn import Parameter

import triton_optim
from triton_optim import dispatch
from triton_optim.backends.triton import stub_driver
from triton_optim.engine import entries, fallback
from triton_optim.kernels.language import PRIMITIVES, jit

pytestmark = pytest.mark.compiled

WHOLE = {"max_grad_norm": 1.0, "ema_decay": 0.9}


class Scalars(NamedTuple):
    lr: float


@jit
def takes_exp(p, g, h):
    return (p - h.lr * tl.exp(g),)


@triton.jit
def wrong_for_triton(x):
    return tl.load(x)


class WrongForTriton(triton_optim.RuleOptimizer):
    rule = takes_exp

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"])


@pytest.fixture(autouse=True)
def triton_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; what is asked of by name stays so."""

    def choose(request: dispatch.Request, machine: dispatch.Machine) -> dispatch.Choice:
        return dispatch.Choice(request.pinned or "triton", "a test")

    monkeypatch.setattr(entries, "choose", choose)
    monkeypatch.setattr(fallback, "next_best", lambda *_: "eager")


@pytest.fixture(params=["loaded", "started"])
def fails(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a launch fail from now on, where the driver loads a kernel or starts it; of the kernel of a name alone."""
    stub_driver.install("sm_90")
    failing: list[str] = []

    def refuse(name: str) -> None:
        if failing and failing[0] in ("", name):
            raise RuntimeError("no kernel image is available for the device\nand more lines")

    if request.param == "loaded":
        load = stub_driver.Utils.load_binary

        def loading(utils: Any, name: str, *given: Any) -> Any:
            refuse(name)
            return load(utils, name, *given)

        monkeypatch.setattr(stub_driver.Utils, "load_binary", loading)
        forget_compiled()
    else:
        start = stub_driver.Launcher.__call__

        def starting(launcher: Any, *given: Any) -> None:
            refuse(launcher._metadata.name)
            start(launcher, *given)

        monkeypatch.setattr(stub_driver.Launcher, "__call__", starting)

    def fail(name: str = "") -> str:
        failing.append(name)
        return str(request.param)

    yield fail
    forget_compiled()


def forget_compiled() -> None:
    from stub_launches import forget_kernels

    forget_kernels()


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    random = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(n, generator=random).to(dtype)) for n in (40, 7)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(dtype)
    return params


def steps(optimizer: Any, count: int) -> list[str]:
    """The warnings of so many steps."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.step()
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize("options", [{}, WHOLE, WHOLE | {"capturable": True}], ids=["plain", "clipped", "capturable"])
def test_the_first_launch_fails(fails: Any, options: dict[str, Any]) -> None:
    """Every step is then eager's, and the warning is given once."""
    params, theirs = parameters(), parameters()
    optimizer = triton_optim.AdamW(params, lr=0.1, **options)
    what = fails()
    said = steps(optimizer, 3)
    steps(triton_optim.AdamW(theirs, lr=0.1, backend="eager", **options), 3)
    assert len(said) == 1
    kernel = (
        "partial_norms" if "max_grad_norm" in options else "form_rows" if "capturable" in options else "multi_tensor"
    )
    assert (
        f"AdamW runs eagerly: the Triton kernel {kernel} could not be {what} on cpu: RuntimeError: no kernel" in said[0]
    )
    assert "triton-optim doctor" in said[0]
    assert "more lines" not in said[0]
    for p, q in zip(params, theirs, strict=True):
        assert torch.equal(p, q)
    assert {report.backend for report in triton_optim.explain(optimizer)} == {"eager"}
    assert "could not be" in triton_optim.explain(optimizer)[0].reason


def test_a_later_launch_fails(fails: Any) -> None:
    """Its step is eager's, from the states and the counts that were there; here, where launches do nothing, zeros."""
    params = parameters()
    optimizer = triton_optim.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=0.1, ema_decay=0.9)
    assert steps(optimizer, 2) == []
    theirs = copy.deepcopy(params)
    for p, q in zip(params, theirs, strict=True):
        q.grad = p.grad.clone()
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.5}]
    other = triton_optim.AdamW(groups, lr=0.1, ema_decay=0.9, backend="eager")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if fails() == "loaded":
        pytest.skip("what is loaded stays so")
    assert len(steps(optimizer, 2)) == 1
    steps(other, 2)
    for p, q in zip(params, theirs, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p]["step"].item() == 4
        for name, value in other.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name


def test_a_backend_that_was_asked_for(fails: Any) -> None:
    """Raises, and nothing has changed."""
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = triton_optim.AdamW(params, backend="triton")
    what = fails()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=rf"cannot run AdamW: the Triton kernel multi_tensor could not be {what}"
        ):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(state["step"].item() == 0 for state in optimizer.state.values())


def test_a_launch_fails_after_another(fails: Any) -> None:
    """Where a part of the parameters was updated, no other backend may do the step again."""
    own, other = parameters(), parameters(torch.float64, 1)
    optimizer = triton_optim.AdamW([*own, *other])
    assert steps(optimizer, 1) == []
    launched: list[str] = []

    def second(launch: Any) -> None:
        launched.append(launch.name)
        if len(launched) == 2:
            raise RuntimeError("the second")

    if fails("none") == "loaded":
        pytest.skip("all kernels are loaded before the first starts")
    stub_driver.installed().on_launch = second
    with pytest.raises(RuntimeError, match=r"AdamW: .*the second.* A part of the parameters .*checkpoint"):
        optimizer.step()


def test_a_rule_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """All buckets are compiled before one is launched. The message has what Triton says of the function that is wrong,
    which the kernel calls, and not where it is.
    """
    stub_driver.install("sm_90")
    monkeypatch.setitem(PRIMITIVES, "exp", (wrong_for_triton, *PRIMITIVES["exp"][1:]))
    said = (
        r"WrongForTriton: the Triton kernel multi_tensor could not be compiled on cpu: \w+: Unsupported ptr type.*load"
    )
    with pytest.raises(RuntimeError, match=said):
        WrongForTriton(parameters(), backend="triton").step()


def test_no_launch_goes_on_after_the_test(fails: Any) -> None:
    """The fixture fails nothing before it is told to."""
    assert steps(triton_optim.SGD(parameters()), 1) == []
