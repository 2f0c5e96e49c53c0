"""LARS: You et al. 2017, Algorithm 1, https://arxiv.org/abs/1708.03888."""

from typing import NamedTuple

from ..language import jit
from .decay import decayed


class LarsScalars(NamedTuple):
    trust: float  # of a parameter: trust_coefficient * |p| / (|g| + l2 * |p|)
    lr: float
    l2: float  # weight decay, added to the gradient
    momentum: float  # 0 on the first step, which sets the buffer to the gradient itself
    one_minus_dampening: float  # 1 on the first step
    nesterov: float  # momentum where Nesterov's form is asked for
    coefficient: float  # what the measure's sums become trust by


@jit
def lars_norms(p, g, h):
    """Squares of the parameter and of the gradient."""
    return p * p, g * g


@jit
def lars_norms_momentum(p, g, momentum_buffer, h):
    """Squares of the parameter and of the gradient, beside a buffer."""
    return p * p, g * g


@jit
def lars(p, g, h):
    """The gradient is subtracted, as long as the parameter says."""
    return (p - h.lr * (h.trust * decayed(g, p, h.l2)),)


@jit
def lars_momentum(p, g, momentum_buffer, h):
    """The running sum of such gradients is."""
    momentum_buffer = h.momentum * momentum_buffer + h.one_minus_dampening * (h.trust * decayed(g, p, h.l2))
    return p - h.lr * momentum_buffer, momentum_buffer


@jit
def lars_nesterov(p, g, momentum_buffer, h):
    """The gradient and the sum, looking ahead."""
    update = h.trust * decayed(g, p, h.l2)
    momentum_buffer = h.momentum * momentum_buffer + h.one_minus_dampening * update
    return p - h.lr * (update + h.nesterov * momentum_buffer), momentum_buffer
