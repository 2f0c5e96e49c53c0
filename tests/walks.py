"""Steps of SOAP and Shampoo on matrices that change."""

from __future__ import annotations

from typing import Any

import torch
from table import CASES
from torch.nn import Parameter

OWN = [case for case in CASES if case.name in ("SOAP", "KLSOAP", "Shampoo")]
OFTEN = {"lr": 0.1, "precondition_frequency": 2}
BASES = [case for case in OWN if case.name != "Shampoo"]


def walked(optimizer: Any, steps: int, seed: int = 0) -> None:
    """Some steps of normally distributed gradients; of no parameter they depend on the others."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for i, p in enumerate(params):
            random = torch.Generator().manual_seed(1000 * seed + 100 * step + i)
            p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64).to(p)
        optimizer.step()


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Parameter:
    random = torch.Generator().manual_seed(len(shape))
    return Parameter(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype))
