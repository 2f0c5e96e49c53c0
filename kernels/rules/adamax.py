"""Adamax: Kingma & Ba 2015, Algorithm 2, https://arxiv.org/abs/1412.6980."""

from typing import NamedTuple

from ..language import abs, jit, maximum
from .decay import decayed


class AdamaxScalars(NamedTuple):
    l2: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    step_size: float  # lr / (1 - beta1^t)
    eps: float


@jit
def adamax(p, g, exp_avg, exp_inf, h):
    """The mean over the largest magnitude, which decays."""
    g = decayed(g, p, h.l2)
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * g
    exp_inf = maximum(h.beta2 * exp_inf, abs(g) + h.eps)
    return p - h.step_size * (exp_avg / exp_inf), exp_avg, exp_inf
