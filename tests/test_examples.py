"""An optimizer of one's own, and a compiled step: they run, and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_optimizer_learns_as_well_as_adamw() -> None:
    example = runpy.run_path(str(EXAMPLES / "own_optimizer.py"))
    accuracies = [
        example["train"](example[name] if name in example else getattr(example["optim"], name))[0]
        for name in ("AdamW", "AdaBelief")
    ]
    assert min(accuracies) > 0.85
    assert abs(accuracies[0] - accuracies[1]) < 0.05


def test_compiled_step_compiles_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = runpy.run_path(str(EXAMPLES / "compiled_step.py"))["train"](8)
    assert losses[-1] < losses[0]
    step_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # The step itself, and the rule's own graph if no test before this one has compiled it.
    assert 1 <= step_graphs <= 2
