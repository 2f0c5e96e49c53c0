"""NAdam: Dozat 2016, Algorithm 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ."""

from typing import NamedTuple

from ..language import jit, sqrt
from .adam import moments
from .decay import decayed


class NAdamScalars(NamedTuple):
    l2: float
    keep: float  # 1 - lr * weight_decay, if the decay is decoupled
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    gradient_step: float  # lr * (1 - mu_t) / (1 - mu_1 ... mu_t)
    momentum_step: float  # lr * mu_{t+1} / (1 - mu_1 ... mu_{t+1})
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@jit
def nadam(p, g, exp_avg, exp_avg_sq, h):
    """Adam with Nesterov momentum."""
    g = decayed(g, p, h.l2)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    update = (h.gradient_step * g + h.momentum_step * exp_avg) / (sqrt(exp_avg_sq) * h.correction + h.eps)
    return p * h.keep - update, exp_avg, exp_avg_sq
