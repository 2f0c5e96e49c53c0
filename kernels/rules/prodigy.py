"""Prodigy: Mishchenko and Defazio 2023, Algorithm 4, https://arxiv.org/abs/2306.06101."""

from typing import NamedTuple

from ..language import abs, jit, sqrt
from .adam import moments
from .decay import decayed


class ProdigyScalars(NamedTuple):
    step_size: float  # d * lr, with the bias corrections
    fade: float  # -step_size * weight_decay, where that is decoupled
    l2: float
    beta1: float
    one_minus_beta1: float  # times d
    beta2: float
    one_minus_beta2: float  # times d^2
    beta3: float
    share: float  # of the gradient in s
    eps: float  # times the new d
    weight: float  # of a parameter's <g, p0 - p>
    counts: float  # 0 where lr is 0, and the group stands still
    decay: float  # of the numerator
    d_coef: float
    growth_rate: float


@jit
def prodigy_sums(p, g, exp_avg, exp_avg_sq, s, p0, h):
    """How far the gradient points back to the start, and the size of s to come."""
    g = decayed(g, p, h.l2)
    return g * (p0 - p), abs(h.beta3 * s + h.share * g)


@jit
def prodigy_samples(p, g, s, p0, h):
    """What `prodigy_sums` sums, and s anew."""
    g = decayed(g, p, h.l2)
    s = h.beta3 * s + h.share * g
    return g * (p0 - p), abs(s), s


@jit
def prodigy_sampled(p, g, exp_avg, exp_avg_sq, h):
    """`prodigy` where s and p0 are of some elements, and elsewhere."""
    exp_avg, exp_avg_sq = moments(decayed(g, p, h.l2), exp_avg, exp_avg_sq, h)
    p = decayed(p, p, h.fade)
    return p - h.step_size * (exp_avg / (sqrt(exp_avg_sq) + h.eps)), exp_avg, exp_avg_sq


@jit
def prodigy(p, g, exp_avg, exp_avg_sq, s, p0, h):
    """Adam of gradients that are multiplied by d, and the sum of these gradients."""
    g = decayed(g, p, h.l2)
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    s = h.beta3 * s + h.share * g
    p = decayed(p, p, h.fade)  # 1 + h.fade might be 1
    return p - h.step_size * (exp_avg / (sqrt(exp_avg_sq) + h.eps)), exp_avg, exp_avg_sq, s, p0
