"""Adagrad: Duchi et al. 2011, equation 1 with a diagonal matrix, https://jmlr.org/papers/v12/duchi11a.html."""

from typing import NamedTuple

from ..language import jit, sqrt
from .decay import decayed


class AdagradScalars(NamedTuple):
    lr: float  # lr / (1 + (t - 1) * lr_decay)
    l2: float
    eps: float


@jit
def adagrad(p, g, sum, h):
    """The gradient over the root of the sum of its squares."""
    g = decayed(g, p, h.l2)
    sum = sum + g * g
    return p - h.lr * g / (sqrt(sum) + h.eps), sum
