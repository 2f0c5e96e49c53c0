"""Optimizers that torch lacks and that are Adam with one thing changed."""

from __future__ import annotations

import numpy as np
import references_more as more
import torch

import triton_optim

from .case import ByHand, Case
from .elementwise import HALVES, MEAN, ROOT

ROWS = [
    Case(
        triton_optim.NAdamW,
        more.nadamw,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True}},
        by_hand=(
            # 0.5 * 1 + 0.5 * 2 = 1.5, corrected 3; then 0.5 * 2.5 + 0.5 * 4 = 3.25, over 0.75
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 3 / 3, "exp_avg": 1.0, "exp_avg_sq": 1.0}),
            ByHand(
                HALVES,
                [2.0, 4.0],
                {"p": 0.85 * 0.95 - 0.1 * 3.25 / 0.75 / (ROOT + 1), "exp_avg": 2.5, "exp_avg_sq": 4.75},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.AdamAtan2,
        more.adam_atan2,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "b": 0.5, "maximize": True}},
        by_hand=(
            # m = v = 1, corrected 2 and 2 * 2: a parameter goes by lr * a * pi / 4, whatever its gradient is.
            ByHand(
                {"lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.5, "a": 2.0},
                [2.0],
                {"p": 0.95 - 0.1 * 2 * np.pi / 4, "exp_avg": 1.0, "exp_avg_sq": 1.0},
            ),
            # Then m = 0.5 * 1 + 0.5 * -1 = 0, and nothing moves.
            ByHand(
                {"lr": 0.1, "betas": (0.5, 0.75), "a": 2.0},
                [2.0, -1.0],
                {"p": 1 - 0.1 * 2 * np.pi / 4, "exp_avg": 0.0, "exp_avg_sq": 1.0},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.LaProp,
        more.laprop,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True}},
        by_hand=(
            # 2 / (2 + 1) enters the mean with lr 0.1, and 4 / (ROOT + 1) with lr 0.2; that of lr is 0.05, then 0.125.
            ByHand(HALVES, [2.0], {"p": (1 - 0.1 * 2 / 3) * 0.95, "exp_avg": 0.1 / 3, "exp_avg_lr": 0.05}),
            ByHand(
                {**HALVES, "lr": lambda index: (0.1, 0.2)[index]},
                [2.0, 4.0],
                {
                    "p": ((1 - 0.2 / 3) * 0.95 - 0.2 / 0.125 * (0.05 / 3 + 0.1 * 4 / (ROOT + 1))) * 0.9,
                    "exp_avg": 0.05 / 3 + 0.1 * 4 / (ROOT + 1),
                    "exp_avg_lr": 0.125,
                },
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
        numbers={"exp_avg_lr": torch.float32},
    ),
    Case(
        triton_optim.AdaBelief,
        more.adabelief,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-8, "maximize": True},
            "coupled": {"weight_decay": 0.1, "decoupled_weight_decay": False, "eps": 1e-4},
        },
        by_hand=(
            # s = 0.25 * (2 - 1)^2 + 1, then 0.75 * 1.25 + 0.25 * (4 - 2.5)^2 + 1
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 2 / (5**0.5 + 1), "exp_avg": 1.0, "exp_avg_var": 1.25}),
            ByHand(
                HALVES,
                [2.0, 4.0],
                {"p": (0.95 - 0.2 / (5**0.5 + 1)) * 0.95 - 0.1 * MEAN / ((40 / 7) ** 0.5 + 1), "exp_avg_var": 2.5},
            ),
            # g = 2 + 0.5
            ByHand(
                {**HALVES, "decoupled_weight_decay": False},
                [2.0],
                {"p": 1 - 0.1 * 2.5 / ((1.25**2 + 4) ** 0.5 + 1), "exp_avg": 1.25},
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.Grams,
        more.grams,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True}},
        by_hand=(
            # m = 1, then 0.25, over 0.75; v = 1, then 0.75 + 0.0625, over 7/16. The sign is that of -0.5.
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 2 / 3, "exp_avg": 1.0, "exp_avg_sq": 1.0}),
            ByHand(
                HALVES, [2.0, -0.5], {"p": (0.95 - 0.2 / 3) * 0.95 + 0.1 / 3 / ((13 / 7) ** 0.5 + 1), "exp_avg": 0.25}
            ),
        ),
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.AdamC,
        more.adamc,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "max_lr": 0.05, "maximize": True},
        },
        by_hand=(
            # The decay is 0.1 * 0.1 / 0.4 * 2 = 0.05.
            ByHand({**HALVES, "weight_decay": 2.0, "max_lr": 0.4}, [2.0], {"p": 0.95 - 0.1 * 2 / 3, "exp_avg": 1.0}),
            ByHand(
                {**HALVES, "weight_decay": 2.0, "max_lr": 0.4},
                [2.0, 4.0],
                {"p": (0.95 - 0.2 / 3) * 0.95 - 0.1 * MEAN / (ROOT + 1), "exp_avg": 2.5, "exp_avg_sq": 4.75},
            ),
            ByHand(HALVES, [2.0], {"p": 0.95 - 0.1 * 2 / 3}),
        ),
        still={"lr": 0.0, "weight_decay": 0.0, "max_lr": 1e-3},  # one of 0 is refused
        settings={"lr": 1e-2, "weight_decay": 0.1, "max_lr": 2e-2},
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
]
