"""Checks of hyperparameters."""

from __future__ import annotations

import inspect
import math
import re
from functools import cache
from numbers import Real
from typing import Any

from torch import Tensor

from ..options import OPTIONS
from ..util.hyperparameters import compared, no_number


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


INF = math.inf

# How torch's messages spell hyperparameters, but for those that they call by the name and "value".
_SPELT = {"lr": "learning rate", "eps": "epsilon value"}
# Of what torch's message about tensors calls by the argument, as `check_range` is told it.
_ARGUMENTS = {
    "learning rate": "lr",
    "beta parameter at index 0": "betas[0]",
    "beta parameter at index 1": "betas[1]",
}


def check_range(name: str, value: Any, low: float, high: float = INF) -> None:
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
        bounds = f"at least {low:g} and " + (f"below {high:g}" if high < INF else "finite")
        raise ValueError(f"Invalid {name}: {value}. It must be {bounds}.")


def check_ranges(group: dict[str, Any], *names: str) -> None:
    """Raise torch's errors unless these hyperparameters of a group are in range: each of betas in [0, 1), any other at
    least 0.
    """
    for name in names:
        value = group[name]
        if type(value) is float and 0.0 <= value < INF:
            continue
        if name == "betas":
            check_betas(value)
        else:
            check_range(_SPELT.get(name, f"{name} value"), value, 0.0)


def check_betas(betas: Any, count: int = 2) -> None:
    """Raise torch's ValueError unless each of so many betas is in [0, 1), and what torch raises unless there are so
    many: TypeError where they are no sequence, IndexError where one is missing.
    """
    for index, beta in enumerate(items_of("betas", betas, count, "each at least 0 and below 1")):
        if not (type(beta) is float and 0.0 <= beta < 1.0):
            check_range(f"beta parameter at index {index}", beta, 0.0, 1.0)


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


# The words of annotations that allow numbers, and tuples of numbers.
_NUMBER = {"float", "int", "Tensor", "None", "Optional", "Union", "torch", "typing", "class"}
_TUPLE = {*_NUMBER, "tuple", "Tuple"}


@cache
def declared_numbers(cls: type) -> dict[str, tuple[Any, bool]]:
    """The hyperparameters of a class that are a number, or a tuple of so many.

    Returns:
        By name the default, in the signature of the constructor or of one that it inherits, and whether None may stand
        for it. What an annotation allows to be something else is left out.
    """
    found: dict[str, tuple[Any, bool]] = {}
    constructors = [base.__dict__["__init__"] for base in reversed(cls.__mro__) if "__init__" in base.__dict__]
    for argument in (a for init in constructors for a in inspect.signature(init).parameters.values()):
        name, default = argument.name, argument.default
        found.pop(name, None)
        items = default if isinstance(default, tuple) else (default,)
        numbers = [x for x in items if isinstance(x, Real) and not isinstance(x, bool)]
        if name in OPTIONS or len(numbers) + sum(x is None for x in items) < len(items):
            continue
        hint = "" if argument.annotation is argument.empty else str(argument.annotation)
        words = set(re.findall(r"\w+", hint))
        if isinstance(default, tuple):
            fits = bool(numbers) and words <= _TUPLE and "..." not in hint
        else:
            fits = words <= _NUMBER and bool(numbers or words & {"float", "int"})
        if fits:
            outside = re.sub(r"\[.*\]", "", hint)
            found[name] = default, default is None or any(x in outside for x in ("None", "Optional", "Union"))
    return found


def hold_numbers(cls: type, group: dict[str, Any]) -> None:
    """Look at the hyperparameters of a group that are numbers, before any is compared. A list, which files of settings
    have for a tuple, becomes one.

    Raises:
        TypeError: one is None, a text or another thing that is no number, or not a sequence of numbers.
        IndexError: one has fewer numbers than the constructor's default, as torch's.
        ValueError: one has more.
    """
    for name, (default, may_be_none) in declared_numbers(cls).items():
        value = group.get(name, default)
        if value is None and may_be_none:
            continue
        if not isinstance(default, tuple):
            if value is None or isinstance(value, str):
                raise no_number(_SPELT.get(name, f"{name} value"), value)
            continue
        items = items_of(name, value, len(default), f"such as {default}")
        for i, (item, usual) in enumerate(zip(items, default, strict=True)):
            if not (hasattr(item, "__float__") or (item is None and usual is None)):
                raise no_number(f"{name}[{i}]", item)
        if items is not value:
            group[name] = items


def items_of(name: str, value: Any, count: int, more: str) -> tuple[Any, ...]:
    """A sequence of so many numbers as a tuple.

    Args:
        more: what the error says that they are.

    Raises:
        TypeError: it is no sequence. IndexError: it has too few. ValueError: it has too many.
    """
    if isinstance(value, tuple) and len(value) == count:
        return value
    try:
        items = None if isinstance(value, str) else tuple(value)
    except TypeError:  # a number, None, or a 0-dim tensor
        items = None
    if items is not None and len(items) == count:
        return items
    kind = TypeError if items is None else IndexError if len(items) < count else ValueError
    hint = " YAML reads 0.9, 0.99 as text, and [0.9, 0.99] as numbers." if isinstance(value, str) else ""
    raise kind(f"Invalid {name}: {value!r}. It must be {count} numbers, {more}.{hint}")
