"""AdaBelief: Zhuang et al. 2020, Algorithm 2, https://arxiv.org/abs/2010.07468."""

from typing import NamedTuple

from ..language import jit
from .adam import descend
from .decay import decayed


class AdaBeliefScalars(NamedTuple):
    l2: float
    keep: float  # 1 - lr * weight_decay, if the decay is decoupled
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^t)
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@jit
def adabelief(p, g, exp_avg, exp_avg_var, h):
    """The mean over the root of how far gradients are from it."""
    g = decayed(g, p, h.l2)
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * g
    surprise = g - exp_avg
    exp_avg_var = h.beta2 * exp_avg_var + h.one_minus_beta2 * surprise * surprise + h.eps
    return descend(p * h.keep, exp_avg, exp_avg_var, h), exp_avg, exp_avg_var
