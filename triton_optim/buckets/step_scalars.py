"""The scalars of a step: formed on the host, or on the device where its numbers are, and handed over as rows."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.straight import check_fields
from ..precision.averaging import weight
from ..spec import COUNT, Update, rounds
from ..util.hyperparameters import plain_group
from .key import Key

_NUMBERS = {float, int, bool}


class StepScalars(NamedTuple):
    """The scalars of one step group in one step."""

    factor: Any  # of the gradient
    h: Any  # the rule's
    scalar_state: dict[str, Any]  # the scalar states after the step, but ``step``
    step: Any  # the number of the update
    weight: Any = 0.0  # of the parameter in its average
    counted: bool = False  # whether the device forms it, and counts the step as it does


def requires_grad(value: Any) -> bool:
    """Whether autograd follows a value."""
    return isinstance(value, Tensor) and value.requires_grad


def scalar_state_dtype(optimizer: Update, group: dict[str, Any], name: str) -> torch.dtype:
    """The dtype of a scalar state, as in torch: float32, but float64 where that is the default; and
    of counts that random bits depend on, for float32 stands still at 2^24, and of what is declared to be exact.
    """
    wide = (
        name in optimizer.exact_scalar_states
        or torch.get_default_dtype() == torch.float64
        or (name in ("step", COUNT) and rounds(group))
    )
    return torch.float64 if wide else torch.float32


def step_scalars_for(
    optimizer: Update,
    group: dict[str, Any],
    step: Any,
    scalar_state: dict[str, Any] | None = None,
    keep: bool = False,
    on_device: dict[str, Any] | None = None,
    values: dict[str, Any] | None = None,
) -> StepScalars:
    """The scalars of a group's parameters in their update number `step`; without `scalar_state`, as before the first.

    Args:
        on_device: hyperparameters that are to be read there.
        values: the others, if they are known.
    """
    values = dict(plain_group(group, keep) if values is None else values)
    if on_device:
        values |= on_device
    if scalar_state is None:
        scalar_state = optimizer.first_scalar_states(group)
    count = None
    if COUNT in scalar_state:
        scalar_state = dict(scalar_state)
        count = scalar_state.pop(COUNT)
    h: Any = optimizer.scalars(values, step, **scalar_state)
    if not hasattr(h, "_fields"):
        raise TypeError(f"{type(optimizer).__name__}.scalars returned {h!r}; it must return a NamedTuple.")
    if not _NUMBERS.issuperset(map(type, h)):
        for name, value in zip(h._fields, h, strict=True):
            if not isinstance(value, (int, float, Tensor)):
                raise TypeError(f"{type(optimizer).__name__}.scalars returned {name}={value!r}; it must be a number.")
    factor = -1.0 if group.get("maximize") else 1.0
    scalar_state = optimizer.update_scalar_state(values, step, **scalar_state) if scalar_state else {}
    if count is None:
        return StepScalars(factor, h, scalar_state, step)
    return StepScalars(factor, h, scalar_state | {COUNT: count + 1}, step, weight(values, count))


def first_scalars(optimizer: Update, key: Key, keep: bool = False) -> list[StepScalars]:
    """The scalars of a bucket's first update, of each group that may have parameters in it."""
    groups = [group for group in optimizer.param_groups if optimizer.running_variant(group) == key.variant]
    return [step_scalars_for(optimizer, group, 1, keep=keep) for group in groups]


def check_scalars(optimizer: Update, key: Key) -> None:
    """Raise TypeError where an optimizer's scalars are not those that the rule of a bucket takes."""
    rows = first_scalars(optimizer, key, key.differentiable)
    one_kind(rows, optimizer)
    check_fields(key.variant.rule, rows[0].h)


def one_kind(rows: list[StepScalars], optimizer: Update) -> None:
    """Raise TypeError unless the rows of one rule are of one type."""
    if len(kinds := {type(row.h) for row in rows}) > 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise TypeError(f"{type(optimizer).__name__}.scalars returned {names} for one rule; it must return one type.")


def plain_cells(row: StepScalars, averaged: bool) -> tuple[float, ...] | None:
    """What a kernel reads of a row; None where some of it is a tensor.

    Args:
        averaged: whether the row ends with the weight of the parameter in its average.
    """
    cells = (row.factor, *row.h, row.weight) if averaged else (row.factor, *row.h)
    if not _NUMBERS.issuperset(map(type, cells)) and any(isinstance(x, Tensor) for x in cells):
        return None
    return tuple(map(float, cells))


def table_of(rows: list[StepScalars | None], dtype: torch.dtype, device: torch.device, averaged: bool) -> Tensor:
    """The rows as a table on the device, made without waiting for it; zeros where there is no row.

    Args:
        averaged: whether a row ends with the weight of the parameter in its average.
    """
    width = 1 + len(next(row.h for row in rows if row is not None)) + averaged
    cells: list[Any] = []
    for row in rows:
        cells += [0.0] * width if row is None else (row.factor, *row.h, row.weight)[:width]
    if any(isinstance(x, Tensor) for x in cells):
        cells = [x if isinstance(x, Tensor) else torch.full((), x, device=device, dtype=torch.float64) for x in cells]
        return torch.stack([x.to(device, dtype) for x in cells]).view(-1, width)
    return to_device(array("d" if dtype == torch.float64 else "f", cells), dtype, device).view(-1, width)


def to_device(values: array[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host values as a tensor on the device, without waiting for it.

    Every copy has pinned memory of its own, which torch's caching allocator does not reuse while it is in flight.
    """
    staged = torch.frombuffer(values, dtype=dtype)
    return staged if device.type == "cpu" else staged.pin_memory().to(device, non_blocking=True)
