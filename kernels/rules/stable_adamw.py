"""StableAdamW: Wortsman et al. 2023, Algorithm 2, https://arxiv.org/abs/2304.13013."""

from typing import NamedTuple

from ..language import jit, maximum, sqrt
from .adam import moments


class StableAdamWScalars(NamedTuple):
    lr: float  # of a parameter: lr / max(1, rms)
    keep: float  # of a parameter: 1 - that * weight_decay
    weight_decay: float
    beta1: float  # beta1 (1 - beta1^(t-1)) / (1 - beta1^t): a mean without bias
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    eps_sq: float


@jit
def stable_adamw_ratio(p, g, exp_avg, exp_avg_sq, h):
    """The square of the gradient over what is expected of it."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return (g * g / maximum(exp_avg_sq, h.eps_sq),)


@jit
def stable_adamw(p, g, exp_avg, exp_avg_sq, h):
    """AdamW with a step that is shorter where the gradient is larger than the second moment knows."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return p * h.keep - h.lr * (exp_avg / (sqrt(exp_avg_sq) + h.eps)), exp_avg, exp_avg_sq
