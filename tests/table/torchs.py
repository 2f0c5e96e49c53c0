"""The optimizers that torch has, which its own stand beside."""

from __future__ import annotations

import references
import torch
from references_matrix import adafactor, muon

import triton_optim

from .case import Case

ROWS = [
    Case(
        triton_optim.AdamW,
        references.adamw,
        {
            "default": {},
            "amsgrad": {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1},
            "maximize": {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-6},
        },
        on_every_backend=True,  # as one that counts its steps
        minimizes={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0},
    ),
    Case(
        triton_optim.Adam,
        references.adam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1},
            "amsgrad": {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
    ),
    Case(
        triton_optim.SGD,
        references.sgd,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        },
        settings={"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9},
        on_every_backend=True,  # as one that does not
        minimizes={"lr": 0.003, "momentum": 0.9},
    ),
    Case(
        triton_optim.Adadelta,
        references.adadelta,
        {"default": {}, "decay": {"lr": 0.1, "rho": 0.8, "weight_decay": 0.1, "maximize": True}},
        minimizes={"lr": 3.0},
    ),
    Case(
        triton_optim.Adagrad,
        references.adagrad,
        {
            "default": {},
            "decays": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True},
            "accumulated": {"initial_accumulator_value": 0.5, "eps": 1e-5},
        },
        minimizes={"lr": 1.5},
    ),
    Case(
        triton_optim.Adamax,
        references.adamax,
        {"default": {}, "decay": {"betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}},
        minimizes={"lr": 0.3, "betas": (0.9, 0.99)},
    ),
    Case(
        triton_optim.ASGD,
        references.asgd,
        {"default": {}, "averaged": {"lr": 0.1, "lambd": 0.1, "t0": 5, "weight_decay": 0.1, "maximize": True}},
        minimizes={"lr": 0.005, "lambd": 0.0},
        numbers={"eta": torch.float32, "mu": torch.float32},
    ),
    Case(
        triton_optim.NAdam,
        references.nadam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.1, "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        on_every_backend=True,  # as one that carries a number besides
        minimizes={"lr": 0.07, "betas": (0.9, 0.99)},
        numbers={"mu_product": torch.float32},
    ),
    Case(
        triton_optim.RAdam,
        references.radam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
        minimizes={"lr": 0.005, "betas": (0.9, 0.9)},
    ),
    Case(
        triton_optim.RMSprop,
        references.rmsprop,
        {
            "default": {},
            "momentum": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "centered": {"centered": True, "alpha": 0.9},
            "centered momentum": {"centered": True, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1},
        },
        settings={"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9},
        minimizes={"lr": 0.1, "momentum": 0.9},
    ),
    Case(
        triton_optim.Rprop,
        references.rprop,
        {"default": {}, "narrow": {"etas": (0.4, 1.5), "step_sizes": (1e-3, 0.02), "maximize": True}},
        still={"lr": 0.0, "step_sizes": (0.0, 50.0)},
        settings={"lr": 1e-2},
        minimizes={"lr": 0.1, "etas": (0.7, 1.2)},
    ),
    Case(
        triton_optim.Adafactor,
        adafactor,
        {
            "default": {},
            "decay": {"lr": 0.1, "beta2_decay": -0.5, "weight_decay": 0.1, "maximize": True},
            "clipped": {"d": 1.5, "eps": (1e-4, 1e-2)},
        },
        complex=False,
        elementwise=False,
        shapes=((4, 3), (5,), (2, 3, 4), ()),  # torch divides by the number of elements
        minimizes={"lr": 0.02, "eps": (None, 1.0), "beta2_decay": -0.5},
    ),
    Case(
        triton_optim.Muon,
        muon,
        {
            "default": {},
            "plain": {"lr": 1e-2, "momentum": 0.8, "nesterov": False},
            "like AdamW": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 4, "weight_decay": 0.0},
        },
        matrices=True,
        complex=False,
        elementwise=False,
        minimizes={"lr": 0.03, "weight_decay": 0.0},
    ),
    Case(
        triton_optim.SparseAdam,
        references.sparse_adam,
        {"default": {}, "maximize": {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "maximize": True}},
        still={"lr": 1e-30},  # 0 is refused
        settings={"lr": 1e-2},
        complex=False,
        sparse=True,
    ),
]
