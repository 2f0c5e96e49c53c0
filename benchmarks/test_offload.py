"""How long is a step in host memory beside DeepSpeed's CPUAdam, and how much of the copies to and from it is hidden?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_optim
from triton_optim.bench.agreement import Contender, assert_agree
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import elements, parameters, shapes
from triton_optim.engine import offload
from triton_optim.race.training import threads

MODEL = "64M16"
SETTINGS = {"lr": 0.1, "weight_decay": 0.1}
THREADS = 2


def contender(name: str, optimizer: torch.optim.Optimizer) -> Contender:
    return Contender(name, optimizer, optimizer.param_groups[0]["params"], optimizer.step)


def in_float32(name: str, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> Contender:
    """What steps 16-bit parameters by an optimizer of float32 copies: gradients in, and parameters out."""
    copies = optimizer.param_groups[0]["params"]

    def step() -> None:
        for copy, p in zip(copies, params, strict=True):
            copy.grad.copy_(p.grad)
        optimizer.step()
        with torch.no_grad():
            for copy, p in zip(copies, params, strict=True):
                p.copy_(copy)

    return Contender(name, optimizer, params, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_offload_beside_deepspeed(dtype: torch.dtype, benchmark: Callable, answer: Callable, patience: float) -> None:
    """In bfloat16 with a float32 copy: all that the host does between gradients that came and parameters that go."""
    adam = pytest.importorskip("deepspeed.ops.adam", reason="deepspeed is not installed")
    half = dtype == torch.bfloat16
    options = {"param_precision": "master", "state_dtype": torch.float32} if half else {}
    made = [list(parameters(shapes(MODEL), dtype=dtype)) for _ in range(3)]
    theirs = made[1:]
    if half:
        theirs = [[torch.nn.Parameter(p.detach().float()) for p in params] for params in theirs]
        for p in (p for params in theirs for p in params):
            p.grad = torch.zeros_like(p)
    with threads(THREADS):
        opts = [adam.DeepSpeedCPUAdam(theirs[0], **SETTINGS), torch.optim.AdamW(theirs[1], fused=True, **SETTINGS)]
        peers = ["DeepSpeedCPUAdam", "torch fused"]
        sides = [contender("ours", triton_optim.AdamW(made[0], backend="cpp", **options, **SETTINGS))]
        for name, opt, params in zip(peers, opts, made[1:], strict=True):
            sides.append(in_float32(name, opt, params) if half else contender(name, opt))
        assert_agree(sides)
        m = measure([Side(side.name, side.step) for side in sides], patience)
    ratio, (low, high) = m.ratio("ours", peers[0]), m.ratio_range("ours", peers[0])
    figures = {f"{side.name} ms": 1e3 * m.median(side.name) for side in sides} | {"ratio": ratio, "threads": THREADS}
    text = ", ".join(f"{side.name} {1e3 * m.median(side.name):.1f} ms" for side in sides)
    words = f"{text}; {ratio:.3f} x {peers[0]} ({low:.3f} to {high:.3f} by round)"
    what = "bfloat16 with master copies" if half else "float32"
    answer(f"AdamW, {MODEL}, {what}, {THREADS} threads", words, figures, value=ratio, target=0.9, measurement=m)
    benchmark.pedantic(sides[0].step, rounds=3)


class Lane:
    """Copies in one direction, one after the other, that each take as long as their bytes do and none of the host's
    time: of each it is known when it will be done.
    """

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._free = 0.0

    def start(self, nbytes: int) -> Callable[[], None]:
        """Returns what waits until it is done, as a GPU's driver does: awake."""
        self._free = done = max(self._free, time.perf_counter()) + nbytes / self._bandwidth

        def wait() -> None:
            while time.perf_counter() < done:
                pass

        return wait


class Wire:
    """A way to a device that does nothing but take its time. In the first step it copies, too: with what lay in memory
    before the loop could take several times as long, as with subnormal numbers.
    """

    bandwidth = 1.0  # bytes a second, in each direction

    def __init__(self, device: torch.device) -> None:
        self._over, self._back = Lane(self.bandwidth), Lane(self.bandwidth)
        self._last: Callable[[], None] | None = None
        self._steps = 0

    def begin(self) -> None:
        self._last = None
        self._steps += 1

    def over(self, pairs: Any) -> Callable[[], object]:
        pairs = list(pairs)
        for to, source in pairs if self._steps == 1 else ():
            to.copy_(source)
        return self._over.start(nbytes(pairs))

    def back(self, pairs: Any) -> None:
        self._last = self._back.start(nbytes(pairs))

    def end(self) -> None:
        if self._last is not None:
            self._last()


def nbytes(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(source.nbytes for _, source in pairs)


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_offload_overlap(
    share: float, benchmark: Callable, answer: Callable, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`share`: how long a copy of all gradients takes, in steps of the loop alone."""
    options = {"param_precision": "master", "state_dtype": torch.float32, **SETTINGS}
    plain, away = (list(parameters(shapes(MODEL), dtype=torch.bfloat16)) for _ in range(2))
    with threads(THREADS):
        alone = triton_optim.AdamW(plain, backend="cpp", **options)
        seconds = measure([Side("alone", alone.step)], patience, rounds=3).median("alone")
        size = 2 * elements(shapes(MODEL))
        monkeypatch.setattr(Wire, "bandwidth", size / (share * seconds))
        monkeypatch.setattr(offload, "link_to", Wire)
        there = triton_optim.AdamW(away, backend="cpp", offload="cpu", **options)
        m = measure([Side("alone", alone.step), Side("offloaded", there.step)], patience)
    step, total, copy = m.median("alone"), m.median("offloaded"), size / Wire.bandwidth
    ratio = total / max(step, copy)
    figures = {"step ms": 1e3 * step, "copy ms": 1e3 * copy, "offloaded ms": 1e3 * total, "threads": THREADS}
    text = (
        f"gradients over {1e3 * copy:.0f} ms, step {1e3 * step:.0f} ms, parameters back {1e3 * copy:.0f} ms: together "
        f"{1e3 * total:.0f} ms, {ratio:.3f} x the longest"
    )
    case = f"AdamW, {MODEL}, bfloat16 with master copies, copies as long as {share:g} steps"
    answer(case, text, figures | {"ratio": ratio}, value=ratio, target=1.1, measurement=m)
    benchmark.pedantic(there.step, rounds=3)
