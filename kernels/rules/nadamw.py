"""NAdamW: Dozat 2016 as AlgoPerf has it, Dahl et al. 2023, appendix D, https://arxiv.org/abs/2306.07179."""

from ..language import jit
from .adam import descend, moments


@jit
def nadamw(p, g, exp_avg, exp_avg_sq, h):
    """AdamW against the mean as it would be after the same gradient once more."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    ahead = h.beta1 * exp_avg + h.one_minus_beta1 * g
    return descend(p * h.decay, ahead, exp_avg_sq, h), exp_avg, exp_avg_sq
