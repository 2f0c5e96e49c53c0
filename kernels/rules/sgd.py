"""Stochastic gradient descent with momentum as torch.optim.SGD defines it; Nesterov's form: Sutskever et al. 2013,
https://proceedings.mlr.press/v28/sutskever13.html.
"""

from typing import NamedTuple

from ..language import jit
from .decay import decayed


class SGDScalars(NamedTuple):
    lr: float
    l2: float  # weight decay, added to the gradient
    momentum: float  # 0 on the first step, which sets the buffer to the gradient itself
    one_minus_dampening: float  # 1 on the first step
    nesterov: float  # momentum where Nesterov's form is asked for


@jit
def sgd(p, g, h):
    """The gradient is subtracted."""
    return (p - h.lr * decayed(g, p, h.l2),)


@jit
def sgd_momentum(p, g, momentum_buffer, h):
    """Its running sum is."""
    g = decayed(g, p, h.l2)
    momentum_buffer = h.momentum * momentum_buffer + h.one_minus_dampening * g
    return p - h.lr * momentum_buffer, momentum_buffer


@jit
def sgd_nesterov(p, g, momentum_buffer, h):
    """The gradient and the sum, looking ahead."""
    g = decayed(g, p, h.l2)
    momentum_buffer = h.momentum * momentum_buffer + h.one_minus_dampening * g
    return p - h.lr * (g + h.nesterov * momentum_buffer), momentum_buffer
