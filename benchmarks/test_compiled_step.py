"""Is a step of the compiled backend on a CPU as fast as the fastest of torch's paths, and at least twice as fast as
foreach where torch has no fused kernel?
"""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import ELEMENTWISE

import triton_optim
from triton_optim.bench.comparison import Case, compare
from triton_optim.bench.models import shapes

PATHS = ("torch-fused", "torch-foreach", "torch-for-loop")
# torch's foreach writes Nesterov's sum into the gradients, so that from step to step they grow.
NOT_FOREACH = ("torch-fused", "torch-for-loop")

# Options that change what is computed, by label.
OTHERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "SGD nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, NOT_FOREACH),
    "RMSprop centered, momentum": ("RMSprop", {"lr": 0.1, "centered": True, "momentum": 0.9}, PATHS),
}
OPTIMIZERS = {name: (name, None, PATHS) for name in ELEMENTWISE} | OTHERS

# Ratios to the fastest of torch's paths; and to foreach, where there is no fused path.
TARGET, TARGET_TO_FOREACH = 1.05, 0.5
CASES: list[tuple[str, str, float | None]] = [
    ("AdamW", "64M16", TARGET),
    ("AdamW", "resnet50", 1.0),
    ("AdamW", "1000x1k", 0.6),
    ("SGD", "64M16", None),
    ("SGD", "1000x1k", None),
    ("Lion", "64M16", None),
    ("Lion", "resnet50", None),
    ("Lion", "1000x1k", None),
    *((name, "resnet50", TARGET) for name in OPTIMIZERS if name not in ("AdamW", "Lion")),
]


@pytest.mark.parametrize(("label", "model", "target"), CASES, ids=[f"{label}-{model}" for label, model, _ in CASES])
def test_step(
    label: str, model: str, target: float | None, benchmark: Callable, answer: Callable, patience: float
) -> None:
    name, settings, peers = OPTIMIZERS[label]
    case = Case(getattr(triton_optim, name), model, shapes(model), settings=settings, label=label)
    found = compare(case, peers, ("compiled",), patience=patience)
    assert not found.disagreeing, found.text
    beside = found.beside()
    if beside is None:
        answer(case.name, found.text, found.figures, measurement=found.measurement)
    else:
        ratios, words = beside
        text, m = f"{found.text}; {words}", found.measurement
        answer(case.name, text, found.figures | ratios, value=ratios["ratio"], target=target, measurement=m)
        if "torch-fused" in found.figures["absent"]:
            ratios, words = found.beside(["torch-foreach"])
            to_foreach = f"{case.name}, share of torch-foreach's time"
            answer(to_foreach, words, ratios, value=ratios["ratio"], target=TARGET_TO_FOREACH)
    benchmark.pedantic(found.contenders[0].step, rounds=10)
