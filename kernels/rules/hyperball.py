"""Hyperball: Wen et al. 2026, https://arxiv.org/abs/2606.16899."""

from typing import NamedTuple

from ..language import jit, sqrt
from .adam import descend, moments


class AdamHScalars(NamedTuple):
    step_size: float  # of a parameter: lr * R / |u|
    back: float  # of a parameter: R / |p - step_size * u|
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    correction: float  # 1 / sqrt(1 - beta2^t)
    eps: float


class MuonHScalars(NamedTuple):
    lr: float  # which the prologue takes


@jit
def adamh_sums(p, g, exp_avg, exp_avg_sq, h):
    """The products of the parameter and of u, Adam's update but for a factor."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    u = exp_avg / (sqrt(exp_avg_sq) * h.correction + h.eps)
    return p * p, p * u, u * u


@jit
def adamh(p, g, exp_avg, exp_avg_sq, h):
    """A step along u, and back to the norm."""
    exp_avg, exp_avg_sq = moments(g, exp_avg, exp_avg_sq, h)
    return descend(p, exp_avg, exp_avg_sq, h) * h.back, exp_avg, exp_avg_sq


@jit
def muonh(p, g, h):
    """The prologue made the whole difference."""
    return (p - g,)
