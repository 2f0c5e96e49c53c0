"""LaProp: Ziyin et al. 2020, Algorithm 1, https://arxiv.org/abs/2002.04839."""

from typing import NamedTuple

from ..language import jit, sqrt


class LaPropScalars(NamedTuple):
    keep: float  # 1 - lr * weight_decay
    beta1: float
    gain: float  # lr * (1 - beta1)
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr over its own mean
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@jit
def laprop(p, g, exp_avg, exp_avg_sq, h):
    """The mean of gradients that are divided by the root of the second moment."""
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    exp_avg = h.beta1 * exp_avg + h.gain * (g / (sqrt(exp_avg_sq) * h.correction + h.eps))
    return (p - h.step_size * exp_avg) * h.keep, exp_avg, exp_avg_sq
