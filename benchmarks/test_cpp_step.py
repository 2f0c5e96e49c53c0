"""Is a step on a CPU at the limit of memory: how long is one of the C++ backend beside the fastest of torch's paths,
and beside DeepSpeed's CPUAdam where that can be installed?
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from test_compiled_step import OPTIMIZERS

import triton_optim
from triton_optim.bench.comparison import Case, compare
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import parameters, shapes

FUSED = ("AdamW", "SGD", "Adagrad")
# Ratios to torch's fused step, and to the fastest of its paths where it has none.
SMALL, MEDIUM, LARGE, NOT_FUSED, BFLOAT16, FLOAT16 = 0.12, 0.95, 1.0, 0.45, 0.5, 0.9
CASES: list[tuple[str, str, torch.dtype, float]] = [
    ("AdamW", "1000x1k", torch.float32, SMALL),
    *((name, "resnet50", torch.float32, MEDIUM) for name in FUSED),
    *((name, "64M16", torch.float32, LARGE) for name in FUSED),
    ("AdamW", "64M16", torch.bfloat16, BFLOAT16),
    ("AdamW", "64M16", torch.float16, FLOAT16),
    *((label, "resnet50", torch.float32, NOT_FUSED) for label, (name, *_) in OPTIMIZERS.items()
      if hasattr(torch.optim, name) and label not in (*FUSED, "Adam", "SGD nesterov")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "model", "dtype", "target"), CASES, ids=[f"{label}-{model}-{dtype}" for label, model, dtype, _ in CASES]
)
def test_step(
    label: str,
    model: str,
    dtype: torch.dtype,
    target: float,
    benchmark: Callable,
    answer: Callable,
    patience: float,
) -> None:
    name, settings, peers = OPTIMIZERS[label]
    own = ("torch-fused",) if name in FUSED else peers
    case = Case(getattr(triton_optim, name), model, shapes(model), dtype, settings=settings, label=label)
    found = compare(case, own, ("cpp",), patience=patience)
    assert not found.disagreeing, found.text
    assert found.backends == ["cpp"]
    ratios, words = found.beside()
    text, m = f"{found.text}; {words}", found.measurement
    answer(case.name, text, found.figures | ratios, value=ratios["ratio"], target=target, measurement=m)
    benchmark.pedantic(found.contenders[0].step, rounds=10)


def test_beside_deepspeed(benchmark: Callable, answer: Callable, patience: float) -> None:
    model, options = "64M16", {"lr": 1e-3, "weight_decay": 0.1}
    case = f"AdamW, {model} ({len(shapes(model))} tensors), beside DeepSpeed's CPUAdam"
    ours = triton_optim.AdamW(list(parameters(shapes(model))), backend="cpp", **options)
    benchmark.pedantic(ours.step, rounds=1)
    try:
        adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        peer = adam(list(parameters(shapes(model))), **options)
    except Exception as error:  # it is not installed, or builds nothing here
        answer(case, f"not measured: {type(error).__name__}: {error}", {})
        return
    m = measure([Side("ours", ours.step), Side("CPUAdam", peer.step)], patience)
    ratios, words = m.compared("ours", ["CPUAdam"])
    answer(case, words, ratios, value=ratios["ratio"], target=1.0, measurement=m)
