"""Weight decay that is added to the gradient."""

from ..language import jit, where


@jit
def decayed(g, p, l2):
    """The gradient plus `l2` times the parameter. 0 leaves no trace of it, though 0 times infinity is NaN."""
    return where(l2 == 0, g, g + l2 * p)
