"""What a step asks of the host: to wait for nothing, to start few kernels, to compile nothing anew, to keep nothing."""

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, TRITON_LOOPS
from launches import replace_launches
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import triton_optim
from triton_optim.backends.compiled import graph as compiled_graph
from triton_optim.backends.compiled import norm as compiled_norm

BF16 = torch.bfloat16
SHAPES = [(40, 33), (7,), (3, 5)]
WHOLE: dict[str, Any] = {"max_grad_norm": 1.0, "ema_decay": 0.9}
CODED: dict[str, Any] = {"param_precision": "stochastic", "state_dtype": "int8", "ema_dtype": BF16}
if TRITON_LOOPS:
    from triton_optim.backends.triton.launch import Launcher

needs_triton = pytest.mark.skipif(not TRITON_LOOPS, reason="no Triton, or an interpreter of it that NumPy broke")


def started(device: torch.device, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Parameter]:
    params = [Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


def kind(launcher: Any) -> str:
    """What it is compiled for."""
    return repr((launcher.kernel, launcher.types, launcher.constants))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launch, by what it is compiled for; none is made."""
    seen: list[str] = []
    replace_launches(monkeypatch, lambda launcher, *_: seen.append(kind(launcher)))
    return seen


@needs_triton
@pytest.mark.parametrize("options", [{}, WHOLE, WHOLE | {"amp": "fused"}], ids=["plain", "whole", "amp"])
def test_a_step_waits_for_nothing(options: dict[str, Any], device: torch.device) -> None:
    params = started(device)
    # As on a device: its numbers are not the host's.
    optimizer = triton_optim.AdamW(params, lr=0.1, capturable=True, backend="triton", **options)
    if "amp" in options:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=device), torch.zeros(1, device=device)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    if HAS_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        # In the interpreter a launch is host work of torch's own.
        with pytest.MonkeyPatch.context() as patch, Waits() as waits:
            if not HAS_GPU:
                replace_launches(patch, lambda *_: None)
            optimizer.step()
    finally:
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert waits.asked == []


@needs_triton
@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, {}), (BF16, CODED)], ids=["float32", "coded"])
def test_a_hundred_steps_are_compiled_for_at_most_four_kinds(
    dtype: torch.dtype, more: dict[str, Any], launched: list[str], device: torch.device
) -> None:
    """Whatever the schedule, the sizes and which gradients there are: a norm, a signal, and an update that takes its
    only row of scalars by value, or a table of them.
    """
    params = started(device, dtype, [(64, 80), (33,)])
    optimizer = triton_optim.AdamW(params, backend="triton", **WHOLE, **more)
    for k in range(100):
        optimizer.param_groups[0] |= {"lr": 0.1 / (k + 1), "weight_decay": 0.01 * k, "betas": (0.9, 0.9 + 0.0009 * k)}
        params[1].grad = None if k % 3 == 0 else torch.randn(33).to(device, dtype)
        optimizer.step()
    by_bucket = len(triton_optim.explain(optimizer))
    assert 100 * 3 <= len(launched) <= 100 * (2 * by_bucket + 1)
    assert len(set(launched)) <= 3 * by_bucket + 1


@needs_triton
@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler, triton_optim.GradScaler], ids=["none", "torch", "ours"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_warmup_compiles_what_the_first_step_launches(
    scaler: Any, clip: float | None, launched: list[str], device: torch.device, monkeypatch: Any
) -> None:
    ahead: list[str] = []
    monkeypatch.setattr(Launcher, "compile", lambda launcher: ahead.append(kind(launcher)))
    params = started(device)
    amp = None if scaler is None else "fused"
    optimizer = triton_optim.AdamW(params, backend="triton", max_grad_norm=clip, ema_decay=0.9, amp=amp)
    optimizer.warmup()
    assert not optimizer.state
    assert launched == []
    # The update, the norm, and what becomes of it: with a scaler, of infinities that it has looked for and of others.
    signals = (2 if amp is not None else 0) + (clip is not None)
    needed = 1 + bool(signals) + signals
    assert needed <= len(set(ahead)) <= needed + 2 * (amp is not None)  # and a step that no scaler makes
    known = set(ahead)
    if scaler is None:
        optimizer.step()
    else:
        given = scaler(device.type)
        given.scale(torch.zeros(1, device=device))
        given.step(optimizer)
    assert launched
    assert set(launched) <= known


@pytest.mark.parametrize("cls", [triton_optim.AdamW, triton_optim.Adafactor, triton_optim.Muon])
def test_after_warmup_the_first_step_compiles_nothing(cls: Any, device: torch.device, monkeypatch: Any) -> None:
    params = started(device, shapes=[(40, 33), (33, 40)])
    before = [p.detach().clone() for p in params]
    optimizer = cls(params, lr=0.0123, backend="compiled", **WHOLE)
    optimizer.warmup()
    assert not optimizer.state
    assert all(torch.equal(p, start) for p, start in zip(params, before, strict=True))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled in the step")

    for module in (compiled_graph, compiled_norm):
        monkeypatch.setattr(module.Graph, "__init__", refuse)
    optimizer.step()
    assert not any(torch.equal(p, start) for p, start in zip(params, before, strict=True))


def test_nothing_grows_over_a_thousand_steps(device: torch.device) -> None:
    params = started(device)
    optimizer = triton_optim.AdamW(params, backend="eager", **WHOLE)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for k in range(1001):
        optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
        params[k % 3].grad = None if k % 5 == 0 else torch.randn_like(params[k % 3])
        optimizer.step()
        if k == 100:
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            before = alive()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert alive() <= before


def test_an_optimizer_is_freed_with_its_memory(device: torch.device) -> None:
    optimizer = triton_optim.AdamW(started(device), backend="eager", **WHOLE)
    optimizer.step()
    watched = [weakref.ref(optimizer), *(weakref.ref(s["ema"]) for s in optimizer.state.values())]
    del optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
