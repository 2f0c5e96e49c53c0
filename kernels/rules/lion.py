"""Lion: Chen et al. 2023, Algorithm 2, https://arxiv.org/abs/2302.06675."""

from typing import NamedTuple

from ..language import jit, sign


class LionScalars(NamedTuple):
    lr: float
    keep: float  # 1 - lr * weight_decay
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float


@jit
def lion(p, g, exp_avg, h):
    """The sign of an interpolated momentum."""
    update = sign(h.beta1 * exp_avg + h.one_minus_beta1 * g)
    exp_avg = h.beta2 * exp_avg + h.one_minus_beta2 * g
    return p * h.keep - h.lr * update, exp_avg
