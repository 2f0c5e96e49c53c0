"""D-Adaptation: Defazio and Mishchenko 2023, Algorithms 4 and 5, https://arxiv.org/abs/2301.07733; Lion's as the
authors' code has it.
"""

from typing import NamedTuple

from ..language import abs, jit, sign, sqrt
from .adam import moments
from .decay import decayed


class DAdaptAdamScalars(NamedTuple):
    fade: float  # -d * lr * weight_decay, where that is decoupled
    l2: float
    beta1: float
    one_minus_beta1: float  # times d * lr
    beta2: float
    one_minus_beta2: float
    beta3: float  # of s
    share: float  # (1 - beta3) * d * lr
    eps: float
    moves: float  # 0 where lr is 0, and the group stands still, else 1
    weight: float  # d * lr: of a parameter's part of the numerator
    counts: float  # of its part of the denominator
    decay: float  # of the numerator
    growth_rate: float


class DAdaptLionScalars(NamedTuple):
    fade: float  # -d * lr * weight_decay
    step_size: float  # d * lr
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float  # times d * lr
    beta3: float  # of s
    share: float  # (1 - beta3) * d * lr
    weight: float  # d * lr: of a parameter's part of the numerator
    counts: float  # of its part of the denominator; 0 where lr is 0, and the group stands still
    decay: float  # of the numerator
    growth_rate: float


class DAdaptSGDScalars(NamedTuple):
    share: float  # d * lr over the first gradient's norm
    l2: float
    momentum: float
    one_minus_momentum: float
    counts: float  # 0 where lr is 0, and the group stands still
    growth_rate: float


@jit
def dadapt_adam_sums(p, g, exp_avg, exp_avg_sq, s, h):
    """How far the gradient agrees with those before, and the size of s to come."""
    g = decayed(g, p, h.l2)
    return g * (s / (sqrt(exp_avg_sq) + h.eps)), abs(h.beta3 * s + h.share * g)


@jit
def dadapt_adam(p, g, exp_avg, exp_avg_sq, s, h):
    """Adam whose momentum is of steps, and a running mean of these."""
    g = decayed(g, p, h.l2)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    s = h.beta3 * s + h.share * g
    return decayed(p, p, h.fade) - h.moves * (exp_avg / (sqrt(exp_avg_sq) + h.eps)), exp_avg, exp_avg_sq, s


@jit
def direction(g, exp_avg, h):
    """Lion's."""
    return sign(h.beta1 * exp_avg + h.one_minus_beta1 * g)


@jit
def dadapt_lion_sums(p, g, exp_avg, s, h):
    """How far the update agrees with those before, and the size of s to come."""
    update = direction(g, exp_avg, h)
    return update * s, abs(h.beta3 * s + h.share * update)


@jit
def dadapt_lion(p, g, exp_avg, s, h):
    """Lion, and a running mean of its steps."""
    update = direction(g, exp_avg, h)
    exp_avg = h.beta2 * exp_avg + h.one_minus_beta2 * g
    s = h.beta3 * s + h.share * update
    return decayed(p, p, h.fade) - h.step_size * update, exp_avg, s


@jit
def dadapt_sgd_sums(p, g, s, x0, h):
    """Products of s and the gradient with each other, and the square of the gradient before the decay."""
    own = g * g
    g = decayed(g, p, h.l2)
    return s * s, s * g, g * g, own


@jit
def dadapt_sgd(p, g, s, x0, h):
    """A mean of the points that the sum of the steps leads to."""
    s = s + h.share * decayed(g, p, h.l2)
    return h.momentum * p + h.one_minus_momentum * (x0 - s), s, x0
