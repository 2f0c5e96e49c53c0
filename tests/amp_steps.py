"""Parameters, gradients and scalers for tests of mixed precision."""

from typing import Any

import pytest
import torch
from conftest import CPP, needs_loops
from torch.nn import Parameter

SCALE = 256.0
SHAPES = [(17, 5), (40,), (3,)]
# A step that skips is run by a kernel that not every interpreter can.
each_backend = pytest.mark.parametrize(
    "backend", ["eager", "compiled", pytest.param("cpp", marks=CPP), pytest.param("triton", marks=needs_loops)]
)


def parameters(device: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in SHAPES]


def give(params: list[Parameter], step: int, scale: float = 1.0, fault: float = 0.0) -> None:
    """Gradients of a step, multiplied by `scale`; `fault` is added to an element of the second."""
    random = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=random)
        if i == 1:
            g[7] += fault
        p.grad = (g.to(p.device, p.dtype) * scale).to(p.dtype)


def new_scaler(scaler_class: Any, device: torch.device, **options: Any) -> Any:
    scaler = scaler_class(device.type, **({"init_scale": SCALE} | options))
    scaler.scale(torch.zeros(1, device=device))  # makes its tensors
    return scaler
