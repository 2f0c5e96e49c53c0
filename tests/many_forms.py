"""A rule in all forms that the language of rules has."""

from __future__ import annotations

from typing import NamedTuple

from triton_optim.kernels.language import abs, jit, sqrt, where


class Scalars(NamedTuple):
    lr: float
    beta: float


@jit
def half(x):
    return 0.5 * x


FACTOR = 3


@jit
def many_forms(p, g, momentum, h):
    """Tuples, calls, constants, conditions on constants."""
    both = (g, momentum)
    g, momentum = both[0] + FACTOR - 3, -both[1] * -1
    if FACTOR == 3 and not FACTOR > 4:
        momentum *= h.beta
    else:
        momentum = p
    momentum += half(g) if FACTOR >= 2 else g
    big = (g > 1) | (g <= -1.0) & ~(g == 5)
    return p - h.lr * where(big, momentum, sqrt(abs(momentum))), momentum
