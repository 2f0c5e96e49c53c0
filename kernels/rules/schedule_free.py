"""Schedule-Free: Defazio et al. 2024, https://arxiv.org/abs/2405.15682. The parameter is y, where gradients are taken."""

from typing import NamedTuple

from ..language import jit, sqrt
from .decay import decayed


class ScheduleFreeAdamWScalars(NamedTuple):
    lr: float
    share: float  # of z in the mean of them all
    y_step: float  # lr * (1 - beta1 * (1 - share))
    weight_decay: float
    beta2: float
    one_minus_beta2: float
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@jit
def schedule_free_adamw(p, g, z, exp_avg_sq, h):
    """AdamW without momentum moves z."""
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    update = decayed(g / (sqrt(exp_avg_sq) * h.correction + h.eps), p, h.weight_decay)
    return p + h.share * (z - p) - h.y_step * update, z - h.lr * update, exp_avg_sq
