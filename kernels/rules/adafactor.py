"""Adafactor: Shazeer & Stern 2018, Algorithms 4 and 5, https://arxiv.org/abs/1804.04235. What the rule takes as the
gradient is divided by its factored second moment, clipped, and scaled by the parameter.
"""

from typing import NamedTuple

from ..language import jit


class AdafactorScalars(NamedTuple):
    rho: float  # the relative step size, min(lr, 1 / sqrt(t))
    keep: float  # 1 - lr * weight_decay
    one_minus_beta2: float  # t^beta2_decay; for the prologue


@jit
def adafactor(p, g, h):
    """What the prologue made of the gradient is subtracted."""
    return (p * h.keep - h.rho * g,)
