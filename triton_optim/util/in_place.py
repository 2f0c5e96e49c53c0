"""Numbers that are kept on a device, written where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def write_each(held: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into what is held, in one launch where that can be."""
    if any(value.requires_grad for value in values):  # autograd has no derivative of it
        for tensor, value in zip(held, values, strict=True):
            tensor.copy_(value)
    else:
        torch._foreach_copy_(list(held), list(values))
