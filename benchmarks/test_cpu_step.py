"""Is a step of the compiled backend on a CPU as fast as the fastest of torch's paths, and at least twice as fast as
foreach where torch has no fused kernel?
"""

import inspect
from collections.abc import Callable

import pytest
import torch
from harness import Side, assert_agree, measure
from models import MODELS, elements, parameters

import triton_optim

PATHS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}

# Optimizer, its options, and torch's.
OPTIMIZERS: dict[str, tuple[type, dict, type | None]] = {
    "AdamW": (triton_optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, torch.optim.AdamW),
    "Adam": (triton_optim.Adam, {"lr": 1e-3}, torch.optim.Adam),
    "SGD": (triton_optim.SGD, {"lr": 1e-3, "momentum": 0.9}, torch.optim.SGD),
    "SGD nesterov": (triton_optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    "Adagrad": (triton_optim.Adagrad, {"lr": 1e-2}, torch.optim.Adagrad),
    "Adadelta": (triton_optim.Adadelta, {"lr": 1.0}, torch.optim.Adadelta),
    "Adamax": (triton_optim.Adamax, {"lr": 2e-3}, torch.optim.Adamax),
    "ASGD": (triton_optim.ASGD, {"lr": 1e-2}, torch.optim.ASGD),
    "NAdam": (triton_optim.NAdam, {"lr": 2e-3}, torch.optim.NAdam),
    "RAdam": (triton_optim.RAdam, {"lr": 1e-3}, torch.optim.RAdam),
    "RMSprop": (triton_optim.RMSprop, {"lr": 1e-2}, torch.optim.RMSprop),
    "RMSprop centered, momentum": (
        triton_optim.RMSprop,
        {"lr": 1e-2, "centered": True, "momentum": 0.9},
        torch.optim.RMSprop,
    ),
    "Rprop": (triton_optim.Rprop, {"lr": 1e-2}, torch.optim.Rprop),
    "Lion": (triton_optim.Lion, {"lr": 1e-4, "weight_decay": 0.1}, None),
}

# Ratios to the fastest of torch's paths; and to foreach, where there is no fused path.
TARGET, TARGET_TO_FOREACH = 1.05, 0.5
CASES: list[tuple[str, str, float | None]] = [
    ("AdamW", "64M in 16", TARGET),
    ("AdamW", "ResNet-50", 1.0),
    ("AdamW", "1000 x 1k", 0.6),
    ("SGD", "64M in 16", None),
    ("SGD", "1000 x 1k", None),
    ("Lion", "64M in 16", None),
    ("Lion", "ResNet-50", None),
    ("Lion", "1000 x 1k", None),
    *((name, "ResNet-50", TARGET) for name in OPTIMIZERS if name not in ("AdamW", "Lion")),
]


def paths(name: str, torchs: type) -> list[str]:
    """Those of torch's paths that the optimizer has on a CPU."""
    known = inspect.signature(torchs).parameters
    # torch's foreach writes Nesterov's sum into the gradients, so that from step to step they grow.
    return [path for path, how in PATHS.items() if {*how} <= {*known} and (name, path) != ("SGD nesterov", "foreach")]


@pytest.mark.parametrize(("name", "model", "target"), CASES, ids=[f"{name}-{model}" for name, model, _ in CASES])
def test_step(
    name: str, model: str, target: float | None, benchmark: Callable, answer: Callable, patience: float
) -> None:
    ours, options, torchs = OPTIMIZERS[name]
    peers = [] if torchs is None else paths(name, torchs)
    optimizers = {"ours": ours(list(parameters(model)), **options)}
    optimizers |= {path: torchs(list(parameters(model)), **options, **PATHS[path]) for path in peers}
    assert_agree(optimizers, steps=3)
    bucket, *others = triton_optim.explain(optimizers["ours"])
    assert (bucket.backend, others) == ("compiled", [])

    m = measure([Side(side, optimizer.step) for side, optimizer in optimizers.items()], patience)

    figures = {f"{side} ms": 1e3 * m.median(side) for side in optimizers}
    figures["ours GB/s"] = bucket.bytes_per_parameter * elements(model) / m.median("ours") / 1e9
    text = ", ".join(f"{side} {1e3 * m.median(side):.2f} ms" for side in optimizers)
    case = f"{name}, {model} ({len(MODELS[model])} tensors)"
    if not peers:
        answer(case, text, figures, measurement=m)
    else:
        ratios, words = m.compared("ours", peers)
        answer(case, f"{text}; {words}", figures | ratios, value=ratios["ratio"], target=target, measurement=m)
        if "fused" not in peers:
            ratios, words = m.compared("ours", ["foreach"])
            answer(f"{case}, share of foreach's time", words, ratios, value=ratios["ratio"], target=TARGET_TO_FOREACH)
    benchmark.pedantic(optimizers["ours"].step, rounds=10)
