"""LAMB: You et al. 2020, Algorithm 2, https://arxiv.org/abs/1904.00962."""

from typing import NamedTuple

from ..language import jit, sqrt
from .adam import moments
from .decay import decayed


class LambScalars(NamedTuple):
    lr: float  # of a parameter: lr * |p| / |update|
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    first: float  # 1 / (1 - beta1^t)
    second: float  # 1 / sqrt(1 - beta2^t)
    eps: float
    weight_decay: float


@jit
def direction(p, exp_avg, exp_avg_sq, h):
    """Adam's, with the decay."""
    return decayed(h.first * exp_avg / (sqrt(exp_avg_sq) * h.second + h.eps), p, h.weight_decay)


@jit
def lamb_norms(p, g, exp_avg, exp_avg_sq, h):
    """Squares of the parameter and of the update to come."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    update = direction(p, exp_avg, exp_avg_sq, h)
    return p * p, update * update


@jit
def lamb(p, g, exp_avg, exp_avg_sq, h):
    """As far as the parameter is long."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return p - h.lr * direction(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq
