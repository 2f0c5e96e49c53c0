"""The hyperparameters of a parameter group for host arithmetic, read anew only where one is another object."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress, count
from numbers import Integral, Real
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from .on_device import OnDevice

PLAIN = frozenset({float, int, bool, str, type(None), torch.dtype})
NOT_NUMBERS = ("params", "param_names")
Check = Callable[[dict[str, Any], "dict[str, Any] | None"], None]
_numbers = count(1)


def plain_number(value: Any, keep: bool = False) -> Any:
    """A hyperparameter for host arithmetic in float64: 1-element CPU tensors become floats, and so do NumPy's numbers.

    A tensor on a device stays there, as reading it would make the host wait; with `keep`, so does every tensor.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        if keep:
            return value.reshape(())
        return value.item() if value.is_cpu else value.detach().double().reshape(())
    if isinstance(value, (tuple, list)):
        return type(value)(plain_number(v, keep) for v in value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if hasattr(value, "__float__") else value


def compared(name: str, value: Any, comparison: Callable[[], Any]) -> bool:
    """What a comparison of a hyperparameter with numbers says; raises TypeError where it is no number."""
    try:
        return bool(comparison())
    except TypeError:
        raise no_number(name, value) from None


def no_number(name: str, value: Any) -> TypeError:
    """The error of a hyperparameter that is no number."""
    hint = " YAML reads 1e-3 as text, and 1.0e-3 as a number." if isinstance(value, str) else ""
    return TypeError(f"Invalid {name}: {value!r}, of type {type(value).__name__}. It must be a number.{hint}")


def exact_number(value: Any) -> Tensor:
    """A number as a float64 tensor: on the CPU; what is a tensor stays on its device."""
    return torch.as_tensor(value, dtype=torch.float64, device=value.device if isinstance(value, Tensor) else "cpu")


def plain_group(group: dict[str, Any], keep: bool = False) -> dict[str, Any]:
    """The hyperparameters of a group for host arithmetic."""
    return {
        name: value if type(value) in PLAIN else plain_number(value, keep)
        for name, value in group.items()
        if name not in NOT_NUMBERS
    }


class Unread:
    """A number in the memory of a device, which no check waits for: it is in every range."""

    def _is(self, _: object) -> bool:
        return True

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = _is
    __hash__ = None  # type: ignore[assignment]


def unread(value: Any) -> Any:
    """A hyperparameter, or a group, with :class:`Unread` in the place of 1-element tensors on a device."""
    if isinstance(value, Tensor):
        return value if value.is_cpu or value.numel() != 1 else Unread()
    if isinstance(value, dict):
        return {name: v if type(v) in PLAIN or name in NOT_NUMBERS else unread(v) for name, v in value.items()}
    return type(value)(map(unread, value)) if isinstance(value, (tuple, list)) else value


class GroupValues:
    """The hyperparameters of one group, as they were when they were last asked for.

    Attributes:
        changes: a number that no other object of this class has had, new where :meth:`read` has found others.
        rebuilt: likewise, where it has found others in more than the values of numbers.
        fixed: whether what is the same object has the same value.
        names, values: of the group, in its order.
        plain: of :func:`plain_group`. Not to be written.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.rebuilt = 0
        self.fixed = False
        self.names: tuple[str, ...] = ()
        self.values: tuple[Any, ...] = ()
        self._kinds: dict[str, Any] = {}
        self.plain: dict[str, Any] = {}

    def read(self, group: dict[str, Any], check: Check | None = None) -> bool:
        """Take note of them as they are now; whether they are others.

        Args:
            group: whose they are.
            check: called with the group if they are others; where no more than the values of numbers is, with these, as
                :func:`unread` gives them, too. If it raises nothing is noted, and it is called again in the next step.
        """
        names, values = tuple(group), tuple(group.values())
        known, read = self.fixed and names == self.names, group
        if known:
            others = list(map(is_not, values, self.values))
            read = dict(zip(compress(names, others), compress(values, others), strict=True))
            if not read:
                return False
            for name, value in read.items():
                if not is_alike(value, self._kinds.get(name)):
                    break
            else:  # as in most steps: a schedule gave others
                if check is not None:
                    check(group, group)
                self.changes, self.values, self.plain = next(_numbers), values, self.plain | read
                return True
        found = {name: kind_of(value) for name, value in read.items() if name not in NOT_NUMBERS}
        more = not found.items() <= self._kinds.items() if known else found != self._kinds
        fixed = None not in found.values()
        if check is not None:
            check(group, None if more else group if fixed else unread(group))
        self.changes = next(_numbers)
        self.names, self.values, self.fixed = names, values, fixed
        self.plain = self.plain | plain_group(read) if known else plain_group(group)
        if more:
            self._kinds = self._kinds | found if known else found
        if more or not fixed:
            self.rebuilt = next(_numbers)
        return True


class Hyperparameters:
    """Those of all groups of an optimizer, as they were when a step last read them; on devices, too, for captured ones.

    Attributes:
        values: of each group.
        max_norm: the largest norm of all gradients together; None for any.
        captured: whether a captured step reads them on a device.
    """

    def __init__(self) -> None:
        self.values: list[GroupValues] = []
        self.captured = False
        self.max_norm: float | None = None
        self._devices: dict[torch.device, OnDevice] = {}

    def read(
        self,
        groups: list[dict[str, Any]],
        check: Check | None = None,
        note: Callable[[int, GroupValues], None] | None = None,
    ) -> None:
        """Take note of those of the groups as they are now.

        Args:
            groups: all of them.
            check: as of :meth:`GroupValues.read`.
            note: called with the number of each group whose hyperparameters are others, and with these.
        """
        if len(self.values) != len(groups):
            self.values = [GroupValues() for _ in groups]
        for i, own in enumerate(self.values):
            if own.read(groups[i], check) and note is not None:
                note(i, own)

    def on_device(self, device: torch.device) -> OnDevice:
        """Those in the memory of `device`, up to date."""
        held = self._devices.get(device)
        if held is None:
            held = self._devices[device] = OnDevice(device)
        self._push(held)
        return held

    def push(self) -> None:
        """Bring every device up to date."""
        for held in self._devices.values():
            self._push(held)

    def _push(self, held: OnDevice) -> None:
        seen = [self.max_norm, *[own.changes for own in self.values]]
        if seen != held.seen:
            held.push([own.plain for own in self.values], self.max_norm, self.captured)
            held.seen = seen


def is_alike(value: Any, kind: Any) -> bool:
    """Whether a hyperparameter is a float, or a tuple of them, and the one before was so, of this :func:`kind_of`."""
    if type(value) is float:
        return kind is float
    return type(value) is tuple and {*map(type, value)} == {float} and kind == [float] * len(value)


def kind_of(value: Any) -> Any:
    """What is the same of two hyperparameters that differ at most in the values of numbers; None of what may change
    and stay the same object. An int counts with its value: it may be meant as a choice.
    """
    kind = type(value)
    if kind is float:
        return kind
    if kind is tuple:
        kinds = [kind_of(x) for x in value]
        return None if None in kinds else kinds
    if kind not in PLAIN and isinstance(value, Real):
        return kind
    return (kind, value) if kind in PLAIN else None
