"""MARS: Yuan et al. 2024, Algorithms 2 and 4, https://arxiv.org/abs/2411.10438."""

from typing import NamedTuple

from ..language import jit, sign
from .adam import descend, moments
from .decay import decayed


class MarsAdamWScalars(NamedTuple):
    clip: float  # of a parameter: 1 / max(1, |corrected gradient|)
    gain: float  # gamma * beta1 / (1 - beta1); from here on a vector has others
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^t)
    correction: float  # 1 / sqrt(1 - beta2^t)
    keep: float  # 1 - lr * weight_decay
    eps: float
    vector_beta1: float  # of vectors that are not corrected
    vector_beta2: float
    vector_step_size: float
    vector_correction: float


class MarsLionScalars(NamedTuple):
    clip: float
    gain: float
    beta1: float
    one_minus_beta1: float
    lr: float
    keep: float


@jit
def corrected(g, previous_grad, h):
    """The gradient, and some of its change."""
    return decayed(g, g - previous_grad, h.gain)


@jit
def mars_adamw_norm(p, g, exp_avg, exp_avg_sq, previous_grad, h):
    """The square of the corrected gradient."""
    change = corrected(g, previous_grad, h)
    return (change * change,)


@jit
def mars_adamw(p, g, exp_avg, exp_avg_sq, previous_grad, h):
    """AdamW of the corrected gradient, which is no longer than 1."""
    exp_avg, exp_avg_sq = moments(h.clip * corrected(g, previous_grad, h), exp_avg, exp_avg_sq, h)
    return descend(p * h.keep, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq, g


@jit
def mars_lion_norm(p, g, exp_avg, previous_grad, h):
    """The square of the corrected gradient."""
    change = corrected(g, previous_grad, h)
    return (change * change,)


@jit
def mars_lion(p, g, exp_avg, previous_grad, h):
    """The sign of the mean of corrected gradients, which are no longer than 1."""
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * (h.clip * corrected(g, previous_grad, h))
    return p * h.keep - h.lr * sign(exp_avg), exp_avg, g
