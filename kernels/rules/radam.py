"""RAdam: Liu et al. 2020, Algorithm 2, https://arxiv.org/abs/1908.03265."""

from typing import NamedTuple

from ..language import jit, sqrt, where
from .adam import moments
from .decay import decayed


class RAdamScalars(NamedTuple):
    l2: float
    keep: float  # 1 - lr * weight_decay, if the decay is decoupled
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    plain_step: float  # lr / (1 - beta1^t) while the variance can't be told, else 0
    adaptive_step: float  # 0 until then, afterwards lr * r_t * sqrt(1 - beta2^t) / (1 - beta1^t)
    eps: float


@jit
def radam(p, g, exp_avg, exp_avg_sq, h):
    """Adam where its variance is tractable, else momentum."""
    g = decayed(g, p, h.l2)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    step = where(h.adaptive_step == 0, h.plain_step, h.adaptive_step / (sqrt(exp_avg_sq) + h.eps))
    return p * h.keep - step * exp_avg, exp_avg, exp_avg_sq
