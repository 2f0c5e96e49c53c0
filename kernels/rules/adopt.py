"""ADOPT: Taniguchi et al. 2024, Algorithm 2 with the clipping of its section 5, https://arxiv.org/abs/2411.02853."""

from typing import NamedTuple

from ..language import jit, maximum, minimum, sqrt, where
from .decay import decayed


class ADOPTScalars(NamedTuple):
    later: float  # 0 in the first step, which sets the second moment alone, else 1
    l2: float
    keep: float  # 1 - lr * weight_decay, if the decay is decoupled
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float  # 0 in the first step
    one_minus_beta2: float
    clip: float  # (t - 1)^clip_exp
    eps: float


@jit
def adopt(p, g, exp_avg, exp_avg_sq, h):
    """The mean of gradients that are divided by the root of the second moment before them."""
    g = decayed(g, p, h.l2)
    update = maximum(minimum(g / maximum(sqrt(exp_avg_sq), h.eps), h.clip), -h.clip)
    exp_avg = where(h.later == 0, exp_avg, h.beta1 * exp_avg + h.one_minus_beta1 * update)
    p = where(h.later == 0, p, p * h.keep - h.lr * exp_avg)
    return p, exp_avg, h.beta2 * exp_avg_sq + h.one_minus_beta2 * g * g
