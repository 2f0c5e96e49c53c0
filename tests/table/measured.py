"""Optimizers that scale an update by what is measured of a parameter, or of the whole model."""

from __future__ import annotations

import torch
from references_distance import (
    DADAPT_ADAM_BY_HAND,
    DADAPT_LION_BY_HAND,
    DADAPT_SGD_BY_HAND,
    PRODIGY_BY_HAND,
    dadapt_adam,
    dadapt_lion,
    dadapt_sgd,
    prodigy,
)
from references_measured import (
    LAMB_BY_HAND,
    LARS_BY_HAND,
    MARS_ADAMW_BY_HAND,
    MARS_LION_BY_HAND,
    NOVOGRAD_BY_HAND,
    STABLE_BY_HAND,
    lamb,
    lars,
    mars_adamw,
    mars_lion,
    novograd,
    stable_adamw,
)

import triton_optim

from .case import ByHand, Case

ROWS = [
    Case(
        triton_optim.LAMB,
        lamb,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True},
            "without trust": {"trust_ratio": False, "eps": 1e-3},
        },
        by_hand=tuple(ByHand(*steps) for steps in LAMB_BY_HAND),
        on_every_backend=True,  # as one that measures
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.LARS,
        lars,
        {
            "default": {},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.1, "dampening": 0.1, "maximize": True},
            "nesterov": {"lr": 0.5, "nesterov": True, "trust_coefficient": 0.1},
            "plain": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.1},
            "without trust": {"lr": 0.1, "trust_ratio": False},
        },
        by_hand=tuple(ByHand(*steps) for steps in LARS_BY_HAND),
        settings={"lr": 1e-2, "weight_decay": 0.1, "trust_coefficient": 1.0},
        elementwise=False,
        minimizes={"lr": 0.03, "trust_coefficient": 0.3},
    ),
    Case(
        triton_optim.NovoGrad,
        novograd,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.7), "eps": 1e-3, "maximize": True},
            "averaged": {"lr": 1e-2, "grad_averaging": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in NOVOGRAD_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.03, "betas": (0.9, 0.99)},
        numbers={"norm_sq": torch.float32},
    ),
    Case(
        triton_optim.MARSAdamW,
        mars_adamw,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "gamma": 0.5, "maximize": True},
            "vectors, too": {"optimize_1d": True, "eps": 1e-6},
        },
        by_hand=tuple(ByHand(*steps) for steps in MARS_ADAMW_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.MARSLion,
        mars_lion,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "beta": 0.8, "gamma": 0.5, "maximize": True}},
        by_hand=tuple(ByHand(*steps) for steps in MARS_LION_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.02, "beta": 0.9},
    ),
    Case(
        triton_optim.StableAdamW,
        stable_adamw,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.7), "eps": 1e-3, "maximize": True}},
        by_hand=tuple(ByHand(*steps) for steps in STABLE_BY_HAND),
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.Prodigy,
        prodigy,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "d0": 0.01, "maximize": True},
            "coupled": {"weight_decay": 0.1, "decouple": False, "beta3": 0.8, "d_coef": 0.5, "d0": 0.1},
            "corrected": {"use_bias_correction": True, "safeguard_warmup": True, "growth_rate": 1.1, "d0": 0.01},
            "sampled": {"slice_p": 3, "weight_decay": 0.1, "decouple": False, "d0": 0.01, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in PRODIGY_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 1.0, "betas": (0.9, 0.99)},
        numbers={"d": torch.float64, "d_max": torch.float64, "d_numerator": torch.float64},
    ),
    Case(
        triton_optim.DAdaptAdam,
        dadapt_adam,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "d0": 0.01, "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decouple": True, "layer_scale": 0.5, "d0": 0.01, "growth_rate": 1.1},
            "corrected": {"use_bias_correction": True, "d0": 0.01},
        },
        by_hand=tuple(ByHand(*steps) for steps in DADAPT_ADAM_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 1.0, "betas": (0.9, 0.99)},
        numbers={"d": torch.float64, "numerator_weighted": torch.float64},
    ),
    Case(
        triton_optim.DAdaptSGD,
        dadapt_sgd,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.8, "d0": 0.01, "maximize": True},
            "bounded": {"d0": 0.01, "growth_rate": 1.1},
        },
        by_hand=tuple(ByHand(*steps) for steps in DADAPT_SGD_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 1.0, "momentum": 0.9},
        numbers={"d": torch.float64, "numerator_weighted": torch.float64, "g0_norm": torch.float64},
    ),
    Case(
        triton_optim.DAdaptLion,
        dadapt_lion,
        {
            "default": {"d0": 1e-3},
            "decay": {"lr": 0.5, "weight_decay": 0.1, "betas": (0.8, 0.9), "d0": 0.01, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in DADAPT_LION_BY_HAND),
        settings={"lr": 0.5, "weight_decay": 0.1, "d0": 0.01},
        elementwise=False,
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
        numbers={"d": torch.float64, "numerator_weighted": torch.float64},
    ),
]
