"""Optimizers that torch lacks and that look at rows, at columns or at whole matrices."""

from __future__ import annotations

import torch
from references_constrained import ADAMH_BY_HAND, MUONH_BY_HAND, SCION_BY_HAND, adamh, muonh, scion
from references_eigen import KL_SOAP_BY_HAND, SHAMPOO_BY_HAND, SOAP_BY_HAND, kl_soap, shampoo, soap
from references_matrix import (
    ADAMUON_BY_HAND,
    CAME_BY_HAND,
    NORMUON_BY_HAND,
    RELATIVE_BY_HAND,
    adafactor_relative,
    adamuon,
    came,
    normuon,
)

import triton_optim

from .case import ByHand, Case

OFTEN = {"lr": 1e-2, "betas": (0.8, 0.9), "precondition_frequency": 2, "max_precond_dim": 6, "maximize": True}

ROWS = [
    Case(
        triton_optim.NorMuon,
        normuon,
        {
            "default": {},
            "plain": {"lr": 1e-2, "momentum": 0.8, "nesterov": False, "beta2": 0.8, "maximize": True},
            "like AdamW": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 4, "weight_decay": 0.0},
        },
        by_hand=tuple(ByHand(*steps) for steps in NORMUON_BY_HAND),
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.03, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.AdaMuon,
        adamuon,
        {"default": {}, "plain": {"lr": 1e-2, "momentum": 0.8, "nesterov": False, "beta2": 0.8, "maximize": True}},
        by_hand=tuple(ByHand(*steps) for steps in ADAMUON_BY_HAND),
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.CAME,
        came,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.7, 0.9), "maximize": True},
            "clipped": {"lr": 1e-2, "clip_threshold": 0.3, "eps": (1e-4, 1e-2)},
        },
        by_hand=tuple(ByHand(*steps) for steps in CAME_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.03, "betas": (0.9, 0.99, 0.999)},
    ),
    Case(
        triton_optim.AdafactorRelative,
        adafactor_relative,
        {
            "default": {},
            "decay": {"decay_rate": -0.5, "weight_decay": 0.1, "maximize": True},
            "momentum": {"lr": 1e-2, "beta1": 0.8, "scale_parameter": False, "weight_decay": 0.1},
            "clipped": {"clip_threshold": 0.5, "eps": (1e-4, 1e-2), "beta1": 0.5},
        },
        by_hand=tuple(ByHand(*steps) for steps in RELATIVE_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.02, "eps": (1e-30, 1.0), "decay_rate": -0.5},
    ),
    Case(
        triton_optim.MuonH,
        muonh,
        {"default": {}, "plain": {"lr": 0.02, "momentum": 0.8, "nesterov": False, "ns_steps": 4, "maximize": True}},
        by_hand=tuple(ByHand(*steps) for steps in MUONH_BY_HAND),
        still={"lr": 0.0},
        settings={"lr": 1e-2},
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={},
    ),
    Case(
        triton_optim.AdamH,
        adamh,
        {"default": {}, "far": {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "maximize": True}},
        by_hand=tuple(ByHand(*steps) for steps in ADAMH_BY_HAND),
        still={"lr": 0.0},
        settings={"lr": 1e-2},
        elementwise=False,
        minimizes={},
        numbers={"initial_norm": torch.float64},
    ),
    Case(
        triton_optim.Scion,
        scion,
        {
            "default": {},
            "unconstrained": {"lr": 1e-2, "momentum": 0.5, "unconstrained": True, "scale": 3.0, "maximize": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in SCION_BY_HAND),
        still={"lr": 0.0},
        settings={"lr": 1e-2, "scale": 2.0},
        complex=False,
        elementwise=False,
        shapes=((4, 3), (5,), (2, 3, 4), ()),
        minimizes={"lr": 0.03, "unconstrained": True},
    ),
    Case(
        triton_optim.SOAP,
        soap,
        {  # longer sides would have several eigenvalues of 0, whose eigenvectors may be any
            "default": {"max_precond_dim": 6},
            "often": OFTEN | {"shampoo_beta": 0.7},
            "one size": {"max_precond_dim": 6, "normalize_grads": True, "correct_bias": False, "weight_decay": 0.1},
        },
        by_hand=tuple(ByHand(*steps) for steps in SOAP_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.KLSOAP,
        kl_soap,
        {
            "default": {"max_precond_dim": 6},
            "often": OFTEN | {"shampoo_beta": 0.7, "correct_bias": True},
        },
        by_hand=tuple(ByHand(*steps) for steps in KL_SOAP_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.Shampoo,
        shampoo,
        {
            "default": {"max_precond_dim": 6},
            "often": OFTEN | {"start_preconditioning_step": 3, "weight_decay": 0.1},
            "sums": {
                "betas": (0.8, 1.0),
                "precondition_frequency": 1,
                "max_precond_dim": 6,
                "grafting": None,
                "eps": 1e-3,
            },
            "like SGD": {"precondition_frequency": 3, "max_precond_dim": 6, "grafting": "sgd"},
            "blocks": {"precondition_frequency": 2, "block_size": 2, "betas": (0.8, 0.9), "weight_decay": 0.1},
        },
        by_hand=tuple(ByHand(*steps) for steps in SHAMPOO_BY_HAND),
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.1, "betas": (0.9, 0.99)},
    ),
]
