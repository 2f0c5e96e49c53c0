"""Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. What the rule takes as the gradient is the
momentum, orthogonalized.
"""

from typing import NamedTuple

from ..language import jit


class MuonScalars(NamedTuple):
    lr: float
    keep: float  # 1 - lr * weight_decay


@jit
def muon(p, g, h):
    """What the prologue made of the momentum is subtracted."""
    return (p * h.keep - h.lr * g,)
