"""The hyperparameters of a parameter group for host arithmetic, read anew only where one is another object."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import Tensor

PLAIN = frozenset({float, int, bool, str, type(None)})
NOT_NUMBERS = ("params", "param_names")


def plain_number(value: Any, keep: bool = False) -> Any:
    """A hyperparameter for host arithmetic in float64: 1-element CPU tensors become floats.

    A tensor on a device stays there, as reading it would make the host wait; with `keep`, so does every tensor.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        if keep:
            return value.reshape(())
        return value.item() if value.device.type == "cpu" else value.detach().double().reshape(())
    if isinstance(value, (tuple, list)):
        return type(value)(plain_number(v, keep) for v in value)
    return value


def plain_group(group: dict[str, Any], keep: bool = False) -> dict[str, Any]:
    """The hyperparameters of a group for host arithmetic."""
    return {
        name: value if type(value) in PLAIN else plain_number(value, keep)
        for name, value in group.items()
        if name not in NOT_NUMBERS
    }


class GroupValues:
    """The hyperparameters of one group, as they were when they were last asked for.

    Attributes:
        changes: how often :meth:`read` has found others.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._names: tuple[str, ...] = ()
        self._values: tuple[Any, ...] = ()
        self._fixed = False  # whether what is the same object has the same value
        self._plain: dict[str, Any] = {}

    def read(self, group: dict[str, Any]) -> dict[str, Any]:
        """The hyperparameters for host arithmetic: of :func:`plain_group`. Not to be written."""
        if not (
            self._fixed
            and len(group) == len(self._values)
            and all(map(is_, group.values(), self._values))
            and tuple(group) == self._names
        ):
            self.changes += 1
            self._names, self._values = tuple(group), tuple(group.values())
            self._plain = plain_group(group)
            self._fixed = all(
                type(value) in PLAIN or (type(value) is tuple and PLAIN.issuperset(map(type, value)))
                for name, value in group.items()
                if name not in NOT_NUMBERS
            )
        return self._plain
