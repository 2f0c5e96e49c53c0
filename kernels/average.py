"""The average of a parameter over the steps: torch.lerp, from which either end comes exactly."""

from .language import jit, where


@jit
def lerp(start, end, weight):
    difference = end - start
    return where(weight < 0.5, start + weight * difference, end - difference * (1 - weight))
