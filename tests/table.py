"""One row an optimizer: what every property test needs to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from references import REFERENCES

import triton_optim


@dataclass(frozen=True)
class Case:
    """An optimizer, torch's own if it has one, the float64 reference, and option sets to run."""

    ours: type[triton_optim.RuleOptimizer]
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    # Options with which no step moves anything.
    still: dict[str, Any] = field(default_factory=lambda: {"lr": 0.0, "weight_decay": 0.0})

    @property
    def name(self) -> str:
        return self.ours.__name__

    @property
    def torchs(self) -> type[torch.optim.Optimizer] | None:
        return getattr(torch.optim, self.name, None)

    @property
    def reference(self) -> Callable[..., Any]:
        return REFERENCES[self.name]


CASES = [
    Case(
        triton_optim.AdamW,
        {
            "default": {},
            "amsgrad": {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1},
            "maximize": {"maximize": True, "betas": (0.8, 0.95), "eps": 1e-6},
        },
    ),
    Case(
        triton_optim.Adam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1},
            "amsgrad": {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
    ),
    Case(
        triton_optim.SGD,
        {
            "default": {},
            "decay": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
            "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
            "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        },
    ),
    Case(
        triton_optim.Lion,
        {"default": {}, "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.95, 0.98), "maximize": True}},
    ),
    Case(
        triton_optim.Adadelta, {"default": {}, "decay": {"lr": 0.1, "rho": 0.8, "weight_decay": 0.1, "maximize": True}}
    ),
    Case(
        triton_optim.Adagrad,
        {
            "default": {},
            "decays": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True},
            "accumulated": {"initial_accumulator_value": 0.5, "eps": 1e-5},
        },
    ),
    Case(triton_optim.Adamax, {"default": {}, "decay": {"betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}}),
    Case(
        triton_optim.ASGD,
        {"default": {}, "averaged": {"lr": 0.1, "lambd": 0.1, "t0": 5, "weight_decay": 0.1, "maximize": True}},
    ),
    Case(
        triton_optim.NAdam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "momentum_decay": 0.1, "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
    ),
    Case(
        triton_optim.RAdam,
        {
            "default": {},
            "decay": {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": True},
            "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        },
    ),
    Case(
        triton_optim.RMSprop,
        {
            "default": {},
            "momentum": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
            "centered": {"centered": True, "alpha": 0.9},
            "centered momentum": {"centered": True, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1},
        },
    ),
    Case(
        triton_optim.Rprop,
        {"default": {}, "narrow": {"etas": (0.4, 1.5), "step_sizes": (1e-3, 0.02), "maximize": True}},
        still={"lr": 0.0, "step_sizes": (0.0, 50.0)},
    ),
]

# (case, variant name), for parametrize(*EVERY).
EVERY = {
    "argnames": ("case", "options"),
    "argvalues": [(case, options) for case in CASES for options in case.variants.values()],
    "ids": [f"{case.name}-{name}" for case in CASES for name in case.variants],
}
