"""RMSprop: Tieleman & Hinton 2012, lecture 6.5, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf.
Centred: Graves 2013, equations 38 to 45, https://arxiv.org/abs/1308.0850.
"""

from typing import NamedTuple

from ..language import jit, sqrt, where
from .decay import decayed


class RMSpropScalars(NamedTuple):
    lr: float
    l2: float
    alpha: float
    one_minus_alpha: float
    momentum: float
    eps: float


@jit
def average(value, now, h):
    """A running mean."""
    return h.alpha * value + h.one_minus_alpha * now


@jit
def average_square(value, now, h):
    """A running mean of squares."""
    return h.alpha * value + h.one_minus_alpha * now * now


@jit
def deviation(square_avg, grad_avg):
    """The root of the mean of squares less the square of the mean."""
    variance = square_avg - grad_avg * grad_avg
    return sqrt(where(variance < 0, 0.0, variance))  # of equal gradients it rounds to less than 0


@jit
def rmsprop(p, g, square_avg, h):
    """The gradient over the root of the mean of its squares."""
    g = decayed(g, p, h.l2)
    square_avg = average_square(square_avg, g, h)
    return p - h.lr * (g / (sqrt(square_avg) + h.eps)), square_avg


@jit
def rmsprop_momentum(p, g, square_avg, momentum_buffer, h):
    """With momentum of what is subtracted."""
    g = decayed(g, p, h.l2)
    square_avg = average_square(square_avg, g, h)
    momentum_buffer = h.momentum * momentum_buffer + g / (sqrt(square_avg) + h.eps)
    return p - h.lr * momentum_buffer, square_avg, momentum_buffer


@jit
def rmsprop_centered(p, g, square_avg, grad_avg, h):
    """Over the deviation in place of the root."""
    g = decayed(g, p, h.l2)
    square_avg, grad_avg = average_square(square_avg, g, h), average(grad_avg, g, h)
    return p - h.lr * (g / (deviation(square_avg, grad_avg) + h.eps)), square_avg, grad_avg


@jit
def rmsprop_centered_momentum(p, g, square_avg, momentum_buffer, grad_avg, h):
    """Both of that."""
    g = decayed(g, p, h.l2)
    square_avg, grad_avg = average_square(square_avg, g, h), average(grad_avg, g, h)
    momentum_buffer = h.momentum * momentum_buffer + g / (deviation(square_avg, grad_avg) + h.eps)
    return p - h.lr * momentum_buffer, square_avg, momentum_buffer, grad_avg
