"""What does an optimizer keep in memory for a parameter, and how much more does a step take while it runs?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peak_memory import Memory, memory_of

import triton_optim
from triton_optim.bench.models import parameters, shapes

MODELS = ("64M16", "resnet50", "1000x1k")
SETTINGS = {"lr": 0.1, "weight_decay": 0.1}
BF16 = torch.bfloat16
# Our options, and torch's optimizer with its own; in the parameter's dtype.
SIDES: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "ours": (triton_optim.AdamW, torch.float32, {}),
    "torch-fused": (torch.optim.AdamW, torch.float32, {"fused": True}),
    "torch-foreach": (torch.optim.AdamW, torch.float32, {"foreach": True}),
    "torch-for-loop": (torch.optim.AdamW, torch.float32, {"foreach": False}),
    "ours, int8 states": (triton_optim.AdamW, torch.float32, {"state_dtype": "int8"}),
    "ours, bf16 stochastic, int8 states": (
        triton_optim.AdamW,
        BF16,
        {"state_dtype": "int8", "param_precision": "stochastic"},
    ),
    "ours, clip and average": (triton_optim.AdamW, torch.float32, {"max_grad_norm": 1.0, "ema_decay": 0.999}),
}


@pytest.mark.parametrize("model", MODELS)
def test_memory(model: str, device: torch.device, answer: Callable) -> None:
    found: dict[str, Memory] = {}
    for name, (kind, dtype, options) in SIDES.items():

        def make(kind: Any = kind, dtype: torch.dtype = dtype, options: dict = options) -> torch.optim.Optimizer:
            return kind(list(parameters(shapes(model), device, dtype)), **SETTINGS, **options)

        found[name] = memory_of(make, device)
    for name, memory in found.items():
        figures = {"kept": memory.kept, "first step": memory.first_step, "temporary": memory.temporary}
        text = (
            f"keeps {memory.kept:.3f} bytes a parameter, and a step takes {memory.temporary:.3f} more "
            f"(the first one {memory.first_step:.3f})"
        )
        answer(f"AdamW, {model} ({len(shapes(model))} tensors), {name}, {device.type}", text, figures)
    answer(
        f"AdamW, {model} ({len(shapes(model))} tensors), {device.type}: temporaries beside torch-foreach's",
        f"{found['ours'].temporary:.3f} bytes a parameter, {found['torch-foreach'].temporary:.3f} with torch-foreach",
        {"ours": found["ours"].temporary, "torch-foreach": found["torch-foreach"].temporary},
    )
