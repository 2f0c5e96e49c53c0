"""Adadelta: Zeiler 2012, Algorithm 1, https://arxiv.org/abs/1212.5701."""

from typing import NamedTuple

from ..language import jit, sqrt
from .decay import decayed


class AdadeltaScalars(NamedTuple):
    lr: float
    l2: float
    rho: float
    one_minus_rho: float
    eps: float


@jit
def adadelta(p, g, square_avg, acc_delta, h):
    """The gradient times the ratio of the roots of two running means."""
    g = decayed(g, p, h.l2)
    square_avg = h.rho * square_avg + h.one_minus_rho * g * g
    delta = sqrt(acc_delta + h.eps) / sqrt(square_avg + h.eps) * g
    acc_delta = h.rho * acc_delta + h.one_minus_rho * delta * delta
    return p - h.lr * delta, square_avg, acc_delta
