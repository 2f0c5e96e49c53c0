"""The optimizers of the package by name, for everything that takes one from a command line or runs them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

import triton_optim

from .core.optimizer import RuleOptimizer


def optimizers() -> dict[str, type[Optimizer]]:
    """The optimizers that the package exports, by their names in lower case."""
    exported = {name.lower(): getattr(triton_optim, name) for name in triton_optim.__all__}
    bases = Optimizer, RuleOptimizer
    kinds = {name: value for name, value in exported.items() if isinstance(value, type) and value not in bases}
    return {name: cls for name, cls in kinds.items() if issubclass(cls, Optimizer)}


def rule_optimizers() -> dict[str, type[RuleOptimizer]]:
    """Those of them that run a rule: all but the closure-driven ones."""
    return {name: cls for name, cls in optimizers().items() if issubclass(cls, RuleOptimizer)}


def wrappers() -> dict[str, Callable[[Any], Any]]:
    """The functions on optimizers that the package exports, by their names."""
    exported = {name: getattr(triton_optim.wrappers, name) for name in triton_optim.wrappers.__all__}
    return {name: value for name, value in exported.items() if not isinstance(value, type)}
