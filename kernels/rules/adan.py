"""Adan: Xie et al. 2022, Algorithm 1, https://arxiv.org/abs/2208.06677."""

from typing import NamedTuple

from ..language import jit, sqrt, where


class AdanScalars(NamedTuple):
    later: float  # 0 in the first step, which has no gradient before it, else 1
    keep: float  # 1 - lr * weight_decay before the step, without the proximal decay
    shrink: float  # 1 / (1 + lr * weight_decay) after it, with
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    beta3: float
    one_minus_beta3: float
    step_size: float  # lr / (1 - beta1^t)
    diff_step: float  # lr * beta2 / (1 - beta2^t)
    correction: float  # 1 / sqrt(1 - beta3^t)
    eps: float


@jit
def adan(p, g, exp_avg, exp_avg_diff, exp_avg_sq, previous_grad, h):
    """The means of the gradient and of its change, over the root of the second moment."""
    diff = where(h.later == 0, 0.0, g - previous_grad)
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * g
    exp_avg_diff = h.beta2 * exp_avg_diff + h.one_minus_beta2 * diff
    ahead = g + h.beta2 * diff
    exp_avg_sq = h.beta3 * exp_avg_sq + h.one_minus_beta3 * ahead * ahead
    update = (h.step_size * exp_avg + h.diff_step * exp_avg_diff) / (sqrt(exp_avg_sq) * h.correction + h.eps)
    return (p * h.keep - update) * h.shrink, exp_avg, exp_avg_diff, exp_avg_sq, g
