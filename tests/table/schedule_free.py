"""The optimizers that need no schedule. Their gradients are taken at one point and the losses at another."""

from __future__ import annotations

import references_more as more
import torch

import triton_optim

from .case import ByHand, Case
from .elementwise import HALVES, ROOT

# Of these gradients the first update is 2 / 3 + 0.5, which moves x = y = z from 1.
FREE = {**HALVES, "weight_lr_power": 1.0}
FREE_AT = 1 - 0.1 * 7 / 6
FREE_SGD = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.5, "weight_lr_power": 1.0}
# Of beta2 = 0.75 the mean is 7 long at most; in the sixth step it is longer than 4, the first time.
FREE_R = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0}
LENGTH = 7 - 12 * 729 / 3367

ROWS = [
    Case(
        triton_optim.ScheduleFreeAdamW,
        more.schedule_free_adamw,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "r": 1.0, "maximize": True},
            "warm-up": {"lr": 1e-2, "warmup_steps": 4, "eps": 1e-4, "weight_lr_power": 1.0},
        },
        by_hand=(
            ByHand(FREE, [2.0], {"p": FREE_AT, "z": FREE_AT, "exp_avg_sq": 1.0, "weight_sum": 0.1}),
            # The weights are 0.1 and 0.3: z moves by -0.3 u, x by 3/4 of that, and y is half of each.
            ByHand(
                {**FREE, "lr": lambda index: (0.1, 0.3)[index]},
                [2.0, 4.0],
                {
                    "p": FREE_AT - 0.3 * 0.875 * (4 / (ROOT + 1) + 0.5 * FREE_AT),
                    "z": FREE_AT - 0.3 * (4 / (ROOT + 1) + 0.5 * FREE_AT),
                    "lr_max": 0.3,
                },
            ),
            # In two steps to 0.1, with weights 1 * 0.05^2 and 2 * 0.1^2: 8/9 of the sum.
            ByHand(
                {**HALVES, "warmup_steps": 2, "r": 1.0, "weight_decay": 0.0},
                [2.0, 4.0],
                {"p": 1 - 0.1 / 3 - 0.1 * 17 / 18 * 4 / (ROOT + 1), "weight_sum": 0.0225},
            ),
        ),
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
        numbers={"weight_sum": torch.float64, "lr_max": torch.float32},
    ),
    Case(
        triton_optim.ScheduleFreeSGD,
        more.schedule_free_sgd,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8, "r": 1.0, "maximize": True},
            "warm-up": {"lr": 0.1, "warmup_steps": 4, "weight_lr_power": 1.0},
        },
        by_hand=(
            ByHand(FREE_SGD, [2.0], {"p": 0.75, "z": 0.75, "weight_sum": 0.1}),
            # u = 4 + 0.5 * 0.75; with weights 0.1 and 0.3 x moves by 3/4 of z's step.
            ByHand(
                {**FREE_SGD, "lr": lambda index: (0.1, 0.3)[index]},
                [2.0, 4.0],
                {"p": 0.75 - 0.3 * 0.875 * 4.375, "z": 0.75 - 0.3 * 4.375, "lr_max": 0.3},
            ),
            # z = 0, x = (1 + 0) / 2: the mean of the points that z came to is 0.5, and y is half of it.
            ByHand({"momentum": 0.5}, [0.0, 1.0], {"p": 0.25, "z": 0.0}),
            ByHand({"lr": 0.5, "warmup_steps": 2, "r": 1.0}, [4.0, 0.0], {"p": 0.0, "weight_sum": 0.5625}),
        ),
        minimizes={"lr": 0.005, "momentum": 0.9, "r": 5.0},
        numbers={"weight_sum": torch.float64, "lr_max": torch.float32},
    ),
    Case(
        triton_optim.ScheduleFreeRAdam,
        more.schedule_free_radam,
        {
            "default": {"betas": (0.9, 0.95)},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "r": 1.0, "maximize": True},
            "SGD first": {"lr": 1e-2, "weight_decay": 0.1, "silent_sgd_phase": False, "weight_lr_power": 1.0},
        },
        by_hand=(
            ByHand(FREE_R, [2.0, 4.0], {"p": 1.0, "z": 1.0, "exp_avg_sq": 4.75, "weight_sum": 0.0, "lr_max": 0.0}),
            # z = 0.8, then 0.4; x is the mean of both, and y half of x and half of z.
            ByHand({**FREE_R, "silent_sgd_phase": False}, [2.0, 4.0], {"p": 0.5, "z": 0.4, "weight_sum": 0.02}),
            ByHand(
                FREE_R,
                [0.0, 0.0, 0.0, 0.0, 0.0, 2.0],
                {
                    "p": 1
                    - 0.1
                    * ((LENGTH - 4) * (LENGTH - 2) * 7 / (3 * 5 * LENGTH)) ** 0.5
                    * 2
                    / ((4096 / 3367) ** 0.5 + 1),
                    "exp_avg_sq": 1.0,
                },
            ),
        ),
        settings={"lr": 1e-2, "weight_decay": 0.1, "silent_sgd_phase": False},  # the first steps move something
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
        numbers={"weight_sum": torch.float64, "lr_max": torch.float32},
    ),
]
