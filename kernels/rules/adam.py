"""Adam: Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980. AMSGrad: Reddi et al. 2018,
https://arxiv.org/abs/1904.09237. Decoupled decay: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
"""

from typing import NamedTuple

from ..language import jit, maximum, sqrt
from .decay import decayed


class AdamScalars(NamedTuple):
    decay: float  # weight_decay (Adam), or 1 - lr * weight_decay (AdamW)
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^t)
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


@jit
def moments(g, exp_avg, exp_avg_sq, h):
    """The running means of the gradient and of its square."""
    exp_avg = h.beta1 * exp_avg + h.one_minus_beta1 * g
    exp_avg_sq = h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
    return exp_avg, exp_avg_sq


@jit
def descend(p, exp_avg, second_moment, h):
    """The parameter after a step against the mean over the root of the second moment."""
    return p - h.step_size * (exp_avg / (sqrt(second_moment) * h.correction + h.eps))


@jit
def adam(p, g, exp_avg, exp_avg_sq, h):
    """Decay goes into the gradient."""
    exp_avg, exp_avg_sq = moments(decayed(g, p, h.decay), exp_avg, exp_avg_sq, h)
    return descend(p, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@jit
def adam_amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, h):
    """The second moment is the largest so far."""
    exp_avg, exp_avg_sq = moments(decayed(g, p, h.decay), exp_avg, exp_avg_sq, h)
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return descend(p, exp_avg, max_exp_avg_sq, h), exp_avg, exp_avg_sq, max_exp_avg_sq


@jit
def adamw(p, g, exp_avg, exp_avg_sq, h):
    """Decay goes into the parameter."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return descend(p * h.decay, exp_avg, exp_avg_sq, h), exp_avg, exp_avg_sq


@jit
def adamw_amsgrad(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, h):
    """Both of that."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    return descend(p * h.decay, exp_avg, max_exp_avg_sq, h), exp_avg, exp_avg_sq, max_exp_avg_sq
