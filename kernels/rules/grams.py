"""Grams: Cao et al. 2024, Algorithm 1, https://arxiv.org/abs/2412.17107."""

from ..language import abs, jit, sign
from .adam import descend, moments


@jit
def grams(p, g, exp_avg, exp_avg_sq, h):
    """AdamW whose update has the sign of the gradient."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return descend(p * h.decay, sign(g) * abs(exp_avg), exp_avg_sq, h), exp_avg, exp_avg_sq
