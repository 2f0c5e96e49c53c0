"""The parameters of a group at the same step, which share a row of scalars, and where their step counts lie."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..spec import COUNT
from .column import Column
from .slots import CPU, ParamSlot
from .step_scalars import requires_grad

_STEP = {"step"}


def place(slots: list[ParamSlot], counted: list[list[str]], captured: bool) -> list[Column]:
    """Move the parameters' numbers that are on the CPU into columns: of each group one, with a cell for each parameter.

    A parameter whose count is in memory that processes share stays where it is, and has columns of its own.

    Args:
        counted: of each parameter, the names of its numbers.
        captured: whether device code writes them: then they are left where they are.
    """
    columns: dict[Any, tuple[Column, list[Tensor]]] = {}
    sizes = Counter((m.group, m.alone) for m in slots)
    taken: Counter[Any] = Counter()
    for m, names in zip(slots, counted, strict=True):
        own = (m.group, m.alone)
        m.columns, m.cell = {}, taken[own]
        taken[own] += 1
        for name in () if captured else names:
            held = m.state.get(name)
            if not isinstance(held, Tensor) or held.device != CPU or requires_grad(m.numbers.get(name)):
                continue
            shared = bool(m.alone) and held.is_shared()  # type: ignore[no-untyped-call]
            kind = (name, held.dtype, own)
            if kind not in columns:
                with torch.inference_mode(False):  # later steps may be made outside of it
                    memory = held.detach().view(1) if shared else torch.zeros(sizes[own], dtype=held.dtype, device=CPU)
                    column = Column(memory)
                    columns[kind] = column, [] if shared else column.cells()
            column, cells = columns[kind]
            if not shared and name in m.given:
                held.data = cells[m.cell]
            elif not shared:
                m.state[name] = cells[m.cell]
            kept = column.start(m.cell, m.numbers[name])
            m.columns[name] = column
            if name != "step" and kept != m.numbers[name]:  # rounded
                m.numbers = m.numbers | {name: kept}
    found = [column for column, _ in columns.values()]
    for column in found:
        column.take()
    return found


class StepGroup:
    """Parameters of one group whose steps were counted alike, and so share one row of scalars.

    Their ``step`` tensors, and those of the other scalar states, are elements of one tensor: incrementing a thousand
    tensors would cost more than all other host work of a step. What a user writes into one of them is noticed.

    Args:
        positions: of the parameters in their bucket.

    Attributes:
        columns: by name, ``(parameters,)``, where the parameters' own numbers lie; of those that are not on the CPU,
            or are written by device code. The others are cells of the bucket's columns.
    """

    def __init__(
        self,
        group: int,
        numbers: dict[str, Any],
        counted: list[str],
        slots: list[ParamSlot],
        positions: list[int],
    ) -> None:
        self.group, self.slots, self.positions = group, slots, positions
        self._numbers = dict(numbers)
        self._counts = "step" in counted
        self._cells = slots[0].columns
        # All of the group have the same number, or some.
        every = all(len(column.tensor) == len(slots) for column in self._cells.values())
        self._at = None if every else [m.cell for m in slots]
        self.columns: dict[str, Tensor] = {}
        for name in counted:
            first = slots[0].state.get(name)
            if isinstance(first, Tensor) and name not in self._cells and not requires_grad(numbers.get(name)):
                shared = slots[0].alone and first.is_shared()  # type: ignore[no-untyped-call]
                with torch.inference_mode(False):  # later steps may be made outside of it
                    column = first.detach().view(1) if shared else first.detach().expand(len(slots)).clone()
                self.columns[name] = column
                for m, own in zip(slots, () if shared else column.unbind(), strict=not shared):
                    m.state[name] = own  # which counts writes with the column
        # Whether all that is counted is `step`, and that on the CPU.
        self._only_steps = not self.columns and self._cells.keys() == (_STEP if self._counts else set())
        self._versions = [t._version for t in self.columns.values()]

    def untouched(self) -> bool:
        """Whether nobody else has written the numbers in :attr:`columns` since the last step."""
        return not self.columns or self._versions == [t._version for t in self.columns.values()]

    @property
    def counted(self) -> tuple[Any, ...]:
        """What the parameters of the group that share a row have in common."""
        return (self.group, *self._numbers.values())

    def numbers(self, on_device: bool = False) -> dict[str, Any]:
        """The scalar states, ``step`` first, as they are before the step; with `on_device` 0-dim float64 tensors."""
        if not self.columns:
            return dict(self._numbers)
        if on_device:
            return self._numbers | {name: column[0].double() for name, column in self.columns.items()}
        # A device is not asked: the host would wait for it.
        here = {name: column[0].item() for name, column in self.columns.items() if column.device == CPU}
        if "step" in here:
            here["step"] = int(here["step"])
        return self._numbers | here

    @property
    def unshared(self) -> dict[str, Any]:
        """Those of the numbers that the host counts."""
        return {name: value for name, value in self._numbers.items() if name not in self.columns}

    def count(self, scalar_state: dict[str, Any]) -> None:
        """Note here that a step was counted."""
        # Where no step is kept, all that is known is that there was one.
        count = self._numbers["step"] + 1 if self._counts else 1
        self._numbers = {"step": count} | {name: v for name, v in scalar_state.items() if not isinstance(v, Tensor)}

    def advance(self, scalar_state: dict[str, Any], skip: Tensor | None = None) -> None:
        """Count a step.

        Args:
            scalar_state: what else is kept, as it is after the step.
            skip: 0-dim, on the device: 1 where the step was none.
        """
        if self._only_steps and not scalar_state:
            count = self._numbers["step"] + 1 if self._counts else 1
            for column in self._cells.values():
                column.write(count, self._at)
            self._numbers = {"step": count}  # others may have the old ones
            return
        self.count(scalar_state)
        if self._counts and "step" not in self.columns and "step" not in self._cells:
            for m in self.slots:
                m.state["step"] = self._numbers["step"]
        for name, value in scalar_state.items():
            if requires_grad(value) or not (name in self.columns or name in self._cells):
                for m in self.slots:  # replaced, as a graph holds the last one
                    m.state[name] = value
        for name in self._cells:
            if not requires_grad(scalar_state.get(name)):
                self._write(name, self._numbers[name] if name in self._numbers else scalar_state[name])
        for name, own in self.columns.items():
            if requires_grad(scalar_state.get(name)):
                continue
            if name == "step":
                own.add_(1 if skip is None else 1 - skip)
            elif skip is not None:
                own.copy_(torch.where(skip != 0, own, scalar_state[name]))
            elif isinstance(scalar_state[name], Tensor):
                own.copy_(scalar_state[name])
            else:
                own.fill_(scalar_state[name])
        self._versions = [t._version for t in self.columns.values()]

    def _write(self, name: str, value: Any) -> None:
        """Give all parameters this number, on the CPU."""
        kept = self._cells[name].write(value, self._at)
        self._numbers[name] = int(value) if name == "step" else kept

    def count_average(self, skip: Tensor | None) -> None:
        """Count a step in which the parameters stayed as they were."""
        if COUNT in self._cells:
            self._write(COUNT, self._numbers[COUNT] + 1)
            return
        if COUNT in self._numbers:
            self._numbers |= {COUNT: self._numbers[COUNT] + 1}
        self.columns[COUNT].add_(1 if skip is None else 1 - skip)
        self._versions = [t._version for t in self.columns.values()]
