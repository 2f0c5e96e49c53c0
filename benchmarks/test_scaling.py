"""How does the time of a step on a CPU grow with tensors and elements, and where is it longer than with the fastest of
torch's paths? Of AdamW and SGD with momentum, 1 to 100,000 tensors of equal size, a thousand to a hundred million
elements in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import triton_optim
from triton_optim.bench.agreement import Contender, assert_agree
from triton_optim.bench.comparison import settle
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import parameters

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "SGD": {"lr": 0.01, "momentum": 0.9},
}
PATHS = {"torch-fused": {"fused": True}, "torch-foreach": {"foreach": True}, "torch-for-loop": {"foreach": False}}
TENSORS = (1, 10, 1_000, 100_000)  # a line of the picture each
# A hundred million elements in as many tensors would take torch's paths ten minutes.
POINTS = [(count, 10**power) for count in TENSORS for power in range(3, 9) if count <= 10**power < 10**13 // count]
LIMIT = 1.05  # of the fastest of torch's paths; beyond it ours is slower
HOPELESS = 3.0  # a path that takes so many times as long as the fastest is not timed on


def contender(name: str, module: Any, optimizer: str, count: int, size: int, **options: Any) -> Contender:
    params = list(parameters([(size,)] * count))
    made = getattr(module, optimizer)(params, **OPTIMIZERS[optimizer], **options)
    return Contender(name, made, params, made.step)


def renewed(c: Contender) -> Side:
    """With gradients that are new objects before each step, where the last ones were, as of a training's."""

    def prepare() -> None:
        for p in c.params:
            p.grad = p.grad.detach()  # type: ignore[union-attr]

    return Side(c.name, c.step, prepare)


def seconds_of(side: Side) -> float:
    """Of the shortest of three steps."""
    found = []
    for _ in range(3):
        assert side.prepare is not None
        side.prepare()
        start = time.perf_counter()
        side.run()
        found.append(time.perf_counter() - start)
    return min(found)


@pytest.mark.parametrize(("count", "elements"), POINTS, ids=lambda number: f"{number:g}")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step(
    optimizer: str, count: int, elements: int, benchmark: Callable, answer: Callable, patience: float
) -> None:
    ours = contender("ours", triton_optim, optimizer, count, elements // count)
    peers = [contender(name, torch.optim, optimizer, count, elements // count, **own) for name, own in PATHS.items()]
    assert_agree([ours, *peers])
    settle([ours])
    sides = {c.name: renewed(c) for c in peers}
    first = {name: seconds_of(side) for name, side in sides.items()}
    timed = [name for name in sides if first[name] <= HOPELESS * min(first.values())]
    m = measure(
        [renewed(ours), *(sides[name] for name in timed)],
        patience,
        rounds=5 if count * len(timed) < 10_000 else 3,
        turn=min(20, max(1, 5_000 // count, 2_000_000 // elements)) if elements < 10**7 else 1,
        warm_up=1,
    )
    ratios, words = m.compared("ours", timed)
    slower = "; **slower**" * (ratios["ratio"] > LIMIT)
    times = ", ".join(f"{name} {1e3 * m.median(name):.3g} ms" for name in ("ours", *timed))
    figures = {f"{name} ms": 1e3 * m.median(name) for name in ("ours", *timed)} | ratios
    figures |= {"optimizer": optimizer, "tensors": count, "elements": elements}
    case = f"{optimizer}, {count:,} tensor{'s' * (count > 1)}, {elements:.0e} elements".replace("e+0", "e")
    answer(case, f"{times}; {words}{slower}", figures, value=ratios["ratio"], target=LIMIT, measurement=m)
    benchmark.pedantic(ours.step, rounds=1)
