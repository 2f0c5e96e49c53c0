"""The average of a parameter over the steps: torch.lerp, from which either end comes exactly."""

from .language import jit, where


@jit
def lerp(start, end, weight):
    """`weight` 1 leaves no trace of the start, and between two equal infinities, where torch's is NaN, lies theirs."""
    difference = end - start
    between = where(weight < 0.5, start + weight * difference, end - difference * (1 - weight))
    return where(weight == 1, end, where(start == end, end, between))
