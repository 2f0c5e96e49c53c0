"""Averaged SGD: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046, with Bottou's schedule."""

from typing import NamedTuple

from ..language import jit, where
from .decay import decayed


class ASGDScalars(NamedTuple):
    l2: float
    keep: float  # 1 - lambd * eta
    eta: float
    mu: float
    one_minus_mu: float


@jit
def asgd(p, g, ax, h):
    """SGD with decay, and the average of its iterates."""
    p, g = p * h.keep, decayed(g, p, h.l2)
    p = p - h.eta * g
    return p, where(h.one_minus_mu == 0, p, h.one_minus_mu * ax + h.mu * p)
