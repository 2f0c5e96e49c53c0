"""Checks of hyperparameters."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..util.hyperparameters import compared


def check_alone(name: str, max_grad_norm: float | None, amp: str | None) -> None:
    """Raise RuntimeError where an optimizer of this name can't release gradients one by one."""
    if max_grad_norm is not None:
        raise RuntimeError(
            f"{name}: max_grad_norm={max_grad_norm} limits the norm of all gradients, which gradient release never has "
            "at once. Leave one of them out, or remove() the handle of gradient release."
        )
    if amp is not None:
        raise RuntimeError(
            f'{name}: amp="{amp}" skips a step whose gradients are not all finite, which gradient release never has at '
            "once. Leave one of them out, or remove() the handle; bfloat16 needs no scaler."
        )


# How torch's messages spell hyperparameters, but for those that they call by the name and "value".
_SPELT = {"lr": "learning rate", "eps": "epsilon value"}
# Of what torch's message about tensors calls by the argument, as `check_range` is told it.
_ARGUMENTS = {
    "learning rate": "lr",
    "beta parameter at index 0": "betas[0]",
    "beta parameter at index 1": "betas[1]",
}


def check_range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise torch's ValueError unless low <= value < high, and its TypeError where value is no number.

    Args:
        name: as torch spells it in its message, such as ``"learning rate"``.
        value: a number or a 1-element tensor.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        shape = tuple(value.shape)
        argument = _ARGUMENTS.get(name, name.removesuffix(" value"))
        raise ValueError(f"Tensor {argument} must be 1-element, got shape {shape}. Use groups to give each its own.")
    if not compared(name, value, lambda: low <= value < high):
        bounds = f"at least {low:g} and " + (f"below {high:g}" if high < math.inf else "finite")
        raise ValueError(f"Invalid {name}: {value}. It must be {bounds}.")


def check_ranges(group: dict[str, Any], *names: str) -> None:
    """Raise torch's errors unless these hyperparameters of a group are in range: each of betas in [0, 1), any other at
    least 0.
    """
    for name in names:
        value = group[name]
        if name == "betas":
            check_betas(value)
        elif not (type(value) is float and 0.0 <= value < math.inf):
            check_range(_SPELT.get(name, f"{name} value"), value, 0.0)


def check_betas(betas: Any, count: int = 2) -> None:
    """Raise torch's ValueError unless each of so many betas is in [0, 1), and what torch raises unless there are so
    many: TypeError where they are no sequence, IndexError where one is missing.
    """
    given = len(betas) if hasattr(betas, "__len__") else None
    if given != count:
        kind = TypeError if given is None else IndexError if given < count else ValueError
        raise kind(f"Invalid betas: {betas!r}. It must be {count} numbers, each at least 0 and below 1.")
    for index in range(count):
        if not (type(betas[index]) is float and 0.0 <= betas[index] < 1.0):
            check_range(f"beta parameter at index {index}", betas[index], 0.0, 1.0)


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless a number is positive."""
    check_range(f"{name} value", value, 0.0)
    if value == 0:
        raise ValueError(f"Invalid {name} value: {value}. It must be positive.")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless a value is a whole number that is large enough."""
    try:
        right = int(value) == value and value >= least
    except (TypeError, ValueError, OverflowError):
        right = False
    if not right:
        raise ValueError(f"Invalid {name} value: {value!r}. It must be an int of {least} or more.")
