"""signSGD and Signum: Bernstein et al. 2018, Algorithms 1 and 2, https://arxiv.org/abs/1802.04434."""

from typing import NamedTuple

from ..language import jit, sign


class SignumScalars(NamedTuple):
    lr: float
    keep: float  # 1 - lr * weight_decay
    beta: float
    one_minus_beta: float


@jit
def signsgd(p, g, h):
    """The sign of the gradient."""
    return (p * h.keep - h.lr * sign(g),)


@jit
def signum(p, g, exp_avg, h):
    """The sign of its mean."""
    exp_avg = h.beta * exp_avg + h.one_minus_beta * g
    return p * h.keep - h.lr * sign(exp_avg), exp_avg
