"""Schedule-Free: Defazio et al. 2024, Algorithm 1, https://arxiv.org/abs/2405.15682. The parameter is y, where
gradients are taken.
"""

from typing import NamedTuple

from ..language import jit, sqrt, where
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


class ScheduleFreeRAdamScalars(NamedTuple):
    lr: float
    share: float
    y_step: float
    weight_decay: float
    beta2: float
    one_minus_beta2: float
    correction: float
    eps: float
    plain: float  # 1 while the variance can't be told, else 0


class ScheduleFreeSGDScalars(NamedTuple):
    lr: float
    share: float
    y_step: float
    weight_decay: float


@jit
def moved(p, z, update, h):
    """y and z after an update that was found at y."""
    return p + h.share * (z - p) - h.y_step * update, z - h.lr * update


@jit
def schedule_free_adamw(p, g, z, exp_avg_sq, h):
    """AdamW without momentum moves z."""
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    update = g / (sqrt(exp_avg_sq) * h.correction + h.eps)
    p, z = moved(p, z, decayed(update, p, h.weight_decay), h)
    return p, z, exp_avg_sq


@jit
def schedule_free_radam(p, g, z, exp_avg_sq, h):
    """So it does where its variance is tractable, else SGD, if anything."""
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    update = where(h.plain != 0, g, g / (sqrt(exp_avg_sq) * h.correction + h.eps))
    p, z = moved(p, z, decayed(update, p, h.weight_decay), h)
    return p, z, exp_avg_sq


@jit
def schedule_free_sgd(p, g, z, h):
    """SGD does."""
    return moved(p, z, decayed(g, p, h.weight_decay), h)
