"""Optimizers that torch lacks, of whose update each element depends on no other."""

from __future__ import annotations

import numpy as np
import references_more as more
import torch
from references_runner import reference

import triton_optim

from .case import ByHand, Case


@reference
def lion(p, g, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    """Chen et al. 2023, Algorithm 2. sign(0) is 0, and so is sign(NaN), as torch.sign's."""
    b1, b2 = betas
    m = state.get("exp_avg", 0)
    c = b1 * m + (1 - b1) * g
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    p = p - lr * (np.where(np.isnan(c), 0, np.sign(c)) + decay)
    state["exp_avg"] = b2 * m + (1 - b2) * g
    return p


LION = {"lr": 0.1, "betas": (0.9, 0.5), "weight_decay": 0.5}
ADAN = {"lr": 0.1, "betas": (0.5, 0.5, 0.75), "eps": 1.0, "weight_decay": 5.0}
HALVES = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0, "weight_decay": 0.5}
# With these, of the gradients 2 and then 4 the first moments of Adam are 1 and 0.5 + 2, the second ones 1 and 0.75 + 4.
MEAN, ROOT = 2.5 / 0.75, (4.75 / (1 - 0.75**2)) ** 0.5  # of the second step, corrected; of the first both are 2
ADEMAMIX = {**HALVES, "betas": (0.5, 0.75, 0.75)}
SIGNUM = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.5}
SOPHIA = {"lr": 0.1, "betas": (0.5, 0.75), "rho": 0.1, "bs": 2, "weight_decay": 0.5}

ROWS = [
    Case(
        triton_optim.Lion,
        lion,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.95, 0.98), "maximize": True}},
        by_hand=(
            # Of the first element c = 0.1 * 2, then 0.9 * 1 + 0.1 * -4 = 0.5: sign +1, where that of g and of m is -1.
            # p = 1 - 0.1 * (1 + 0.5 * 1) = 0.85, then 0.85 - 0.1 * (1 + 0.5 * 0.85); m = 1, then 0.5 * 1 + 0.5 * -4.
            # Of the second c = -0.2, then 0.9 * -1 + 0.1 * 18.5 = 0.95; the third has no gradient, and decays alone.
            ByHand(LION, [[2.0, -2.0, 0.0]], {"p": [0.85, 1.05, 0.95], "exp_avg": [1.0, -1.0, 0.0]}),
            ByHand(
                LION,
                [[2.0, -2.0, 0.0], [-4.0, 18.5, 0.0]],
                {"p": [0.7075, 0.8975, 0.9025], "exp_avg": [-1.5, 8.75, 0.0]},
            ),
            # c = 0.1, then 0.9 * 0.01 - 0.1 = -0.091.
            ByHand({}, [1.0], {"p": 0.9999, "exp_avg": 0.01}),
            ByHand({}, [1.0, -1.0], {"p": 1.0, "exp_avg": -1e-4}),
        ),
        minimizes={"lr": 0.02},
    ),
    Case(
        triton_optim.Adan,
        more.adan,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.8, 0.95), "maximize": True},
            "decay first": {"weight_decay": 0.1, "no_prox": True},
        },
        by_hand=(
            # m = 1, v = 0, n = 1, corrected 2, 0 and 4: p = (1 - 0.1 * 2 / (2 + 1)) / (1 + 0.1 * 5)
            ByHand(ADAN, [2.0], {"p": 14 / 22.5, "exp_avg": 1.0, "exp_avg_diff": 0.0, "exp_avg_sq": 1.0}),
            # d = 2: m = 0.5 + 2, v = 0.5 * 2, n = 0.75 * 1 + 0.25 * (4 + 0.5 * 2)^2 = 7, corrected 10/3, 4/3 and 16
            ByHand(
                ADAN,
                [2.0, 4.0],
                {
                    "p": (14 / 22.5 - 0.1 * (10 / 3 + 0.5 * 4 / 3) / (16**0.5 + 1)) / 1.5,
                    "exp_avg": 2.5,
                    "exp_avg_diff": 1.0,
                    "exp_avg_sq": 7.0,
                    "previous_grad": 4.0,
                },
            ),
            ByHand(ADAN | {"no_prox": True}, [2.0], {"p": 0.5 - 0.2 / 3}),
        ),
        minimizes={"lr": 0.2, "betas": (0.9, 0.9, 0.99)},
    ),
    Case(
        triton_optim.AdEMAMix,
        more.ademamix,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9, 0.99), "alpha": 5.0, "maximize": True},
            "warm-up": {"lr": 1e-2, "alpha": 8.0, "beta3_warmup": 7, "alpha_warmup": 4},
        },
        by_hand=(
            # The slow mean is 0.25 * 2, then 0.75 * 0.5 + 0.25 * 4, not corrected.
            ByHand(ADEMAMIX, [2.0], {"p": 1 - 0.1 * (3 / 3 + 0.5), "exp_avg_slow": 0.5, "exp_avg_fast": 1.0}),
            ByHand(
                ADEMAMIX,
                [2.0, 4.0],
                {
                    "p": 0.85 - 0.1 * ((MEAN + 2 * 1.375) / (ROOT + 1) + 0.5 * 0.85),
                    "exp_avg_slow": 1.375,
                    "exp_avg_sq": 4.75,
                },
            ),
            # Half-lives of 1 and 3: in the first of two steps it is 2. alpha is half of 2.
            ByHand(
                {**HALVES, "betas": (0.5, 0.75, 0.5 ** (1 / 3)), "beta3_warmup": 2, "alpha_warmup": 2},
                [2.0],
                {"p": 0.95 - 0.1 * (2 + 2 * (1 - 0.5**0.5)) / 3, "exp_avg_slow": 2 * (1 - 0.5**0.5)},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99, 0.95)},
    ),
    Case(
        triton_optim.SimplifiedAdEMAMix,
        more.simplified_ademamix,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "alpha": 2.0, "maximize": True},
            "warm-up": {"beta1_warmup": 5, "bias_correction1": True, "bias_correction2": False},
        },
        by_hand=(
            # m = 2, then 1 + 4.
            ByHand({**HALVES, "alpha": 1.0}, [2.0], {"p": 0.95 - 0.1 * 4 / 3, "exp_avg": 2.0, "num_sum": 1.0}),
            ByHand(
                {**HALVES, "alpha": 1.0},
                [2.0, 4.0],
                {"p": (0.95 - 0.4 / 3) * 0.95 - 0.1 * 9 / (ROOT + 1), "exp_avg": 5.0, "num_sum": 1.5},
            ),
            ByHand(
                {**HALVES, "alpha": 1.0, "bias_correction1": True, "bias_correction2": False},
                [2.0, 4.0],
                {"p": (0.95 - 0.1 * 4 / 1.5) * 0.95 - 0.1 * 9 / 1.5 / (4.75**0.5 + (7 / 16) ** 0.5)},
            ),
            # A half-life of 1 that becomes 3 in two steps: 2 in the first, and 3 in the second.
            ByHand(
                {"betas": (0.5 ** (1 / 3), 0.75), "min_beta1": 0.5, "beta1_warmup": 2, "lr": 0.0},
                [2.0, 4.0],
                {"exp_avg": 2 * 0.5 ** (1 / 3) + 4},
            ),
        ),
        minimizes={"lr": 0.02, "betas": (0.9, 0.99)},
        numbers={"num_sum": torch.float32},
    ),
    Case(
        triton_optim.ADOPT,
        more.adopt,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True},
            "decoupled": {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 0.5},
            "not clipped": {"lr": 1e-2, "clip_exp": None, "betas": (0.8, 0.95)},
        },
        by_hand=(
            # The first step sets v = 4; then 8 / 2 is clipped to 1 and 100 / sqrt(19) to 2^0.25.
            ByHand({**HALVES, "weight_decay": 0}, [2.0], {"p": 1.0, "exp_avg": 0.0, "exp_avg_sq": 4.0}),
            ByHand({**HALVES, "weight_decay": 0}, [2.0, 1.0], {"p": 0.975, "exp_avg": 0.25, "exp_avg_sq": 3.25}),
            ByHand({**HALVES, "weight_decay": 0}, [2.0, -8.0], {"p": 1.05, "exp_avg": -0.5, "exp_avg_sq": 19.0}),
            ByHand({**HALVES, "weight_decay": 0}, [2.0, 8.0, 100.0], {"exp_avg": 0.25 + 0.5 * 2**0.25}),
            ByHand({**HALVES, "weight_decay": 0, "clip_exp": None}, [2.0, 8.0], {"exp_avg": 2.0}),
            # g = 2 + 0.5, then 1 + 0.5
            ByHand(HALVES, [2.0, 1.0], {"p": 1 - 0.1 * 0.5 * 1.5 / 2.5, "exp_avg_sq": 0.75 * 6.25 + 0.25 * 2.25}),
            ByHand({**HALVES, "decoupled_weight_decay": True}, [2.0, 1.0], {"p": 0.95 - 0.025, "exp_avg_sq": 3.25}),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.Signum,
        more.signum,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.5, "maximize": True},
            "signSGD": {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.0},
        },
        by_hand=(
            # m = 1, -1, 0, then -1.5, 0, 0.
            ByHand(SIGNUM, [[2.0, -2.0, 0.0]], {"p": [0.85, 1.05, 0.95], "exp_avg": [1.0, -1.0, 0.0]}),
            ByHand(
                SIGNUM,
                [[2.0, -2.0, 0.0], [-4.0, 1.0, 0.0]],
                {"p": [0.9075, 0.9975, 0.9025], "exp_avg": [-1.5, 0.0, 0.0]},
            ),
            ByHand({**SIGNUM, "momentum": 0.0}, [[2.0, 0.0], [-0.5, 0.5]], {"p": [0.9075, 0.8025]}),
        ),
        minimizes={"lr": 0.02},
    ),
    Case(
        triton_optim.Tiger,
        more.tiger,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "beta": 0.5, "maximize": True}},
        by_hand=(
            ByHand({"lr": 0.1, "beta": 0.75, "weight_decay": 0.5}, [2.0], {"p": 0.85, "exp_avg": 0.5}),
            # m = 0.375 - 0.25 is positive yet.
            ByHand({"lr": 0.1, "beta": 0.75, "weight_decay": 0.5}, [2.0, -1.0], {"p": 0.7075, "exp_avg": 0.125}),
        ),
        minimizes={"lr": 0.02, "beta": 0.9, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.SophiaG,
        more.sophia,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "maximize": True}},
        by_hand=(
            ByHand(SOPHIA, [2.0], {"p": 0.85, "exp_avg": 1.0, "hessian": 0.0}),
            ByHand(SOPHIA, [2.0, -1.0], {"p": 0.85 * 0.95, "exp_avg": 0.0}),  # test_sophia.py has estimates
        ),
        minimizes={"lr": 0.02, "weight_decay": 0.0},
    ),
]
