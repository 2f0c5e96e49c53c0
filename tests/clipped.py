"""Gradients to be clipped, and their norm in float64."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

torchs_norm, torchs_value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_
ORDERS = [1.0, 2.0, 3.0, 0.5, math.inf]


def random(shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Tensor:
    parts = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=parts).to(device, dtype)


def with_grads(gradients: list[Tensor | None]) -> list[Parameter]:
    params = []
    for g in gradients:
        params.append(Parameter(torch.zeros(3) if g is None else torch.zeros_like(g)))
        params[-1].grad = g if g is None else g.clone(memory_format=torch.preserve_format)
    return params


def exact(tensors: list[Tensor], order: float) -> float:
    """The norm in float64 by numpy."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    flat = np.abs(np.concatenate([t.detach().cpu().to(wide).numpy().reshape(-1) for t in tensors]))
    if order == math.inf:
        return float(flat.max())
    return float(math.fsum(flat**order) ** (1 / order))


def assert_within_2_ulp(norm: Tensor, expected: float) -> None:
    """Of float32; in float64, where nothing is wider, to what summation in it leaves."""
    ulp = 50 * np.spacing(expected) if norm.dtype == torch.float64 else np.spacing(np.float32(expected))
    assert abs(norm.item() - expected) <= 2 * ulp
