"""Rprop: Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623, without backtracking."""

from typing import NamedTuple

from ..language import jit, sign, where


class RpropScalars(NamedTuple):
    shrink: float
    grow: float
    smallest: float
    largest: float


@jit
def rprop(p, g, prev, step_size, h):
    """Steps that grow while the sign of the gradient stays, and shrink where it turns."""
    agreement = sign(g) * sign(prev)
    step_size = where(agreement > 0, step_size * h.grow, where(agreement < 0, step_size * h.shrink, step_size))
    step_size = where(step_size < h.smallest, h.smallest, where(step_size > h.largest, h.largest, step_size))
    g = where(agreement < 0, 0.0, g)
    return p - step_size * sign(g), g, step_size
