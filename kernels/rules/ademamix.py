"""AdEMAMix: Pagliardini et al. 2024, Algorithm 1, https://arxiv.org/abs/2409.03137. Simplified AdEMAMix: Morwani et al.
2025, Algorithm 1, https://arxiv.org/abs/2502.02431.
"""

from typing import NamedTuple

from ..language import jit, sqrt


class AdEMAMixScalars(NamedTuple):
    keep: float  # 1 - lr * weight_decay
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    beta3: float
    one_minus_beta3: float
    fast_step: float  # lr / (1 - beta1^t)
    slow_step: float  # lr * alpha
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


class SimplifiedAdEMAMixScalars(NamedTuple):
    keep: float  # 1 - lr * weight_decay
    beta1: float
    beta2: float
    one_minus_beta2: float
    alpha: float
    step_size: float  # lr, over what the chosen bias corrections divide by
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@jit
def ademamix(p, g, exp_avg_fast, exp_avg_slow, exp_avg_sq, h):
    """A fast and a slow mean of the gradient, over the root of the second moment."""
    exp_avg_fast = h.beta1 * exp_avg_fast + h.one_minus_beta1 * g
    exp_avg_slow = h.beta3 * exp_avg_slow + h.one_minus_beta3 * g
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    update = (h.fast_step * exp_avg_fast + h.slow_step * exp_avg_slow) / (sqrt(exp_avg_sq) * h.correction + h.eps)
    return p * h.keep - update, exp_avg_fast, exp_avg_slow, exp_avg_sq


@jit
def simplified_ademamix(p, g, exp_avg, exp_avg_sq, h):
    """The gradient and its running sum, over the root of the second moment."""
    exp_avg = h.beta1 * exp_avg + g
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    update = (h.alpha * g + exp_avg) / (sqrt(exp_avg_sq) * h.correction + h.eps)
    return p * h.keep - h.step_size * update, exp_avg, exp_avg_sq
