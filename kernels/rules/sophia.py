"""Sophia: Liu et al. 2023, Algorithm 3, https://arxiv.org/abs/2305.14342."""

from typing import NamedTuple

from ..language import abs, jit, minimum, sign, where


class SophiaGScalars(NamedTuple):
    estimating: (
        float  # 1 where the gradient is one of sampled labels, which the estimate of the Hessian takes in, else 0
    )
    lr: float
    keep: float  # 1 - lr * weight_decay
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    scale: float  # rho * bs, of the estimate


@jit
def sophia(p, g, exp_avg, hessian, h):
    """The mean of the gradient over an estimate of the Hessian's diagonal, up to a step of lr."""
    hessian = where(h.estimating == 0, hessian, h.beta2 * hessian + h.one_minus_beta2 * g * g)
    exp_avg = where(h.estimating == 0, h.beta1 * exp_avg + h.one_minus_beta1 * g, exp_avg)
    ratio = minimum(abs(exp_avg) / (h.scale * hessian + 1e-15), 1.0)
    return where(h.estimating == 0, p * h.keep - h.lr * sign(exp_avg) * ratio, p), exp_avg, hessian
