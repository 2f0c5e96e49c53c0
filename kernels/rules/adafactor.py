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


class AdafactorRelativeScalars(NamedTuple):
    rho: float  # the step size, before it is multiplied by the parameter's own; all of them for the prologue
    one_minus_beta1: float
    one_minus_beta2: float  # t^decay_rate
    weight_decay: float


@jit
def adafactor_relative(p, g, h):
    """What the prologue made of the gradient is subtracted, which has its step size already."""
    return (p - g,)
