"""NovoGrad: Ginsburg et al. 2019, Algorithm 1, https://arxiv.org/abs/1905.11286."""

from typing import NamedTuple

from ..language import jit
from .decay import decayed


class NovoGradScalars(NamedTuple):
    scale: float  # of a parameter: 1 / (sqrt(v) + eps)
    lr: float
    l2: float
    beta1: float
    share: float  # of what is new in the momentum: 1, or 1 - beta1
    beta2: float  # of v, which the scale is made of
    one_minus_beta2: float
    eps: float


@jit
def novograd_norm(p, g, exp_avg, h):
    """The square of the gradient."""
    return (g * g,)


@jit
def novograd(p, g, exp_avg, h):
    """The momentum of gradients that are divided by their norm."""
    exp_avg = h.beta1 * exp_avg + h.share * decayed(h.scale * g, p, h.l2)
    return p - h.lr * exp_avg, exp_avg
