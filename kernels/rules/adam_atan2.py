"""Adam-atan2: Everett et al. 2024, appendix, https://arxiv.org/abs/2407.05872."""

from typing import NamedTuple

from ..language import jit, sqrt
from ..words import atan2
from .adam import moments


class AdamAtan2Scalars(NamedTuple):
    keep: float  # 1 - lr * weight_decay
    step_size: float  # lr * a
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    first: float  # 1 / (1 - beta1^t)
    second: float  # b / sqrt(1 - beta2^t)


@jit
def adam_atan2(p, g, exp_avg, exp_avg_sq, h):
    """Against the angle of the mean and the root of the second moment, which needs no eps."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    angle = atan2(h.first * exp_avg, h.second * sqrt(exp_avg_sq))
    return p * h.keep - h.step_size * angle, exp_avg, exp_avg_sq
