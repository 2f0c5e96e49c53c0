"""A step with gradients that a test has."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def step_with(optimizer: Any, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """One step with these gradients, of any dtype; None for a parameter without."""
    cast = any(g is not None and g.dtype != p.dtype for p, g in zip(params, gradients, strict=True))
    if cast and not hasattr(torch.Tensor, "grad_dtype"):  # torch < 2.10 refuses such a gradient wherever it is assigned
        optimizer.engine.update(list(gradients))
        return
    for p, g in zip(params, gradients, strict=True):
        if g is not None and g.dtype != p.dtype:
            p.grad_dtype = g.dtype  # type: ignore[attr-defined]
        p.grad = g
    optimizer.step()
