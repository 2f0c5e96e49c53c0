"""Is a step of the compiled backend on a CPU as fast as torch's fused kernel?"""

from collections.abc import Callable

import pytest
import torch
from harness import Side, assert_agree, measure
from models import MODELS, elements, parameters

import triton_optim

ADAMW = {"lr": 1e-3, "weight_decay": 0.1}
SGD = {"lr": 1e-3, "momentum": 0.9}
LION = {"lr": 1e-4, "weight_decay": 0.1}
TORCHS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}

# Optimizer, its options, torch's, the model, and the ratio to torch's fused one to reach.
CASES = [
    (triton_optim.AdamW, ADAMW, torch.optim.AdamW, "64M in 16", 1.05),
    (triton_optim.AdamW, ADAMW, torch.optim.AdamW, "ResNet-50", 1.0),
    (triton_optim.AdamW, ADAMW, torch.optim.AdamW, "1000 x 1k", 0.6),
    (triton_optim.SGD, SGD, torch.optim.SGD, "64M in 16", None),
    (triton_optim.SGD, SGD, torch.optim.SGD, "ResNet-50", None),
    (triton_optim.SGD, SGD, torch.optim.SGD, "1000 x 1k", None),
    (triton_optim.Lion, LION, None, "64M in 16", None),
    (triton_optim.Lion, LION, None, "ResNet-50", None),
    (triton_optim.Lion, LION, None, "1000 x 1k", None),
]


@pytest.mark.parametrize(
    ("ours", "options", "torchs", "model", "target"), CASES, ids=[f"{case[0].__name__}-{case[3]}" for case in CASES]
)
def test_step(
    ours: type,
    options: dict,
    torchs: type | None,
    model: str,
    target: float | None,
    benchmark: Callable,
    answer: Callable,
    patience: float,
) -> None:
    optimizers = {"ours": ours(list(parameters(model)), **options)}
    if torchs is not None:
        optimizers |= {name: torchs(list(parameters(model)), **options, **how) for name, how in TORCHS.items()}
    assert_agree(optimizers, steps=3)
    bucket, *others = triton_optim.explain(optimizers["ours"])
    assert (bucket.backend, others) == ("compiled", [])

    m = measure([Side(name, optimizer.step) for name, optimizer in optimizers.items()], patience)

    figures = {f"{name} ms": 1e3 * m.median(name) for name in optimizers}
    figures["ours GB/s"] = bucket.bytes_per_parameter * elements(model) / m.median("ours") / 1e9
    text = ", ".join(f"{name} {1e3 * m.median(name):.2f} ms" for name in optimizers)
    if torchs is not None:
        low, high = m.ratio_range("ours", "fused")
        figures |= {"ratio": m.ratio("ours", "fused"), "lowest ratio": low, "highest ratio": high}
        text += f"; {figures['ratio']:.3f} x fused ({low:.3f} to {high:.3f} by round)"
    case = f"{ours.__name__}, {model} ({len(MODELS[model])} tensors)"
    answer(case, text, figures, value=figures.get("ratio"), target=target, measurement=m)
    benchmark.pedantic(optimizers["ours"].step, rounds=10)
