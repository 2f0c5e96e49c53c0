"""CAME: Luo et al. 2023, Algorithm 2, https://arxiv.org/abs/2307.02047. What the rule takes as the gradient is the
momentum over the root of its instability.
"""

from typing import NamedTuple

from ..language import jit


class CameScalars(NamedTuple):
    lr: float
    keep: float  # 1 - lr * weight_decay
    one_minus_beta1: float  # from here on for the prologue
    one_minus_beta2: float
    one_minus_beta3: float


@jit
def came(p, g, h):
    """What the prologue made of the gradient is subtracted."""
    return (p * h.keep - h.lr * g,)
