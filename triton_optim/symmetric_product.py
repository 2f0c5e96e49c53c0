"""Products of a matrix with its own transpose."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric_product(x: Tensor, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None) -> Tensor:
    """``alpha * x[b] @ x[b].T + beta * c[b]`` for a batch."""
    if c is None:
        return alpha * torch.bmm(x, x.mT)
    return torch.baddbmm(c, x, x.mT, beta=beta, alpha=alpha)
