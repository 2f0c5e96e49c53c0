"""A parameter in a plan, and those of a group that were counted alike, which share a row of scalars."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .averaging import count_so_far
from .codecs import AVERAGE, CORRECTIONS, COUNT, keep_parameter, keep_state
from .rows import counted_dtype, requires_grad
from .state import State

if TYPE_CHECKING:
    from .bucket import Key
    from .optimizer import RuleOptimizer

CPU = torch.device("cpu")
_CELLS = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


class Member:
    """A parameter in a plan."""

    __slots__ = ("group", "index", "numbers", "p", "state")

    def __init__(self, optimizer: RuleOptimizer, index: int, group: int, p: Tensor) -> None:
        self.index, self.group, self.p = index, group, p
        self.state: dict[str, Any] = optimizer.state.get(p, State())
        own_group = optimizer.param_groups[group]
        if "step" in self.state:
            count = int(self.state["step"])
        else:
            known = any(value is not None for name, value in self.state.items() if name not in CORRECTIONS)
            count = int(known and not optimizer.counts_steps)
        started = optimizer.started(own_group)
        if COUNT in started and self.state.get(AVERAGE) is None:
            started[COUNT] = count_so_far(optimizer)
        # The number of steps so far, and what else is carried: members that have these in common share scalars.
        self.numbers: dict[str, Any] = {"step": count}
        for name, value in started.items():
            held = self.state.get(name, value)
            # What autograd is to follow stays the tensor it is.
            follows = own_group.get("differentiable") and requires_grad(held)
            self.numbers[name] = held if follows else float(held)

    def start(self, optimizer: RuleOptimizer, key: Key, begun: dict[Any, Tensor]) -> None:
        """Make the states that are not there yet, and ``step`` and its like tensors where they belong.

        Args:
            begun: tensors of numbers, for all members of a plan: a cohort will give each its own.
        """
        group = optimizer.param_groups[self.group]
        counted = optimizer.counted_names(group)
        param, *kept = key.codecs
        if not (key.variant.state_names or counted or key.variant.prologue or param.suffixes or self.state):
            return
        self.state = optimizer.state[self.p]
        device = self.p.device if key.capturable or optimizer.counts_on_device else CPU
        for name in counted:
            if requires_grad(self.numbers.get(name)):
                continue
            if name == "step" and not optimizer.step_is_tensor:
                self.state[name] = self.numbers[name]
                continue
            held = self.state.get(name, self.numbers[name])
            if isinstance(held, Tensor):
                self.state[name] = held.to(device, counted_dtype()).reshape(())
            else:
                if (held, device) not in begun:
                    begun[held, device] = torch.tensor(held, dtype=counted_dtype(), device=device)
                self.state[name] = begun[held, device]
        keep_parameter(self.state, self.p, param)
        for name, codec in zip(key.variant.state_names, kept, strict=True):
            if self.state.get(name) is None:
                self.state |= optimizer.new_state(name, self.p, group, codec)
            else:
                keep_state(optimizer, self.state, name, self.p, codec)
        if key.variant.prologue:
            self.state |= {n: v for n, v in optimizer.prologue_state(self.p, group).items() if n not in self.state}


class Cohort:
    """Members of one group whose steps were counted alike, and so share one row of scalars.

    Their ``step`` tensors, and those of what else is carried, share one element of memory: incrementing a thousand
    would cost more than all other host work of a step.
    """

    def __init__(
        self,
        group: int,
        numbers: dict[str, Any],
        counted: list[str],
        members: list[Member],
        places: list[int],
        captured: bool = False,
    ) -> None:
        self.group, self.members, self.places = group, members, places
        self._numbers = numbers
        self._counts = "step" in counted
        self.shared: dict[str, Tensor] = {}
        # Those on the CPU, with where they lay: an operation of torch takes longer than all else that is done to them.
        self._cells: dict[str, tuple[int, Any]] = {}
        for name in counted:
            if isinstance(members[0].state.get(name), Tensor) and not requires_grad(numbers.get(name)):
                shared = self.shared[name] = members[0].state[name].detach().clone()
                if shared.device == CPU and not captured:  # what is written past torch is in no graph
                    self._cells[name] = (0, None)
                for m in members:
                    m.state[name] = shared.detach()

    @property
    def counted(self) -> tuple[Any, ...]:
        """What the members of the group that share a row have in common."""
        return (self.group, *self._numbers.values())

    def numbers(self, on_device: bool = False) -> dict[str, Any]:
        """``step`` and what else is carried, as they are before the step; with `on_device` 0-dim float64 tensors."""
        if on_device:
            return self._numbers | {name: value.double() for name, value in self.shared.items()}
        # A device is not asked: the host would wait for it.
        here = {
            name: self._cell(name).value if name in self._cells else value.item()
            for name, value in self.shared.items()
            if value.device == CPU
        }
        if "step" in here:
            here["step"] = int(here["step"])
        return self._numbers | here

    def _cell(self, name: str) -> Any:
        """The memory of a number, as a C number. A user may have moved it, as ``share_memory_`` does."""
        address, cell = self._cells[name]
        tensor = self.shared[name]
        now = tensor.data_ptr()
        if now != address:
            if not tensor.untyped_storage().nbytes():
                raise RuntimeError(f"the memory of {name!r} was freed. Load a state dict, or clear opt.state.")
            cell = _CELLS[tensor.dtype].from_address(now)
            self._cells[name] = now, cell
        return cell

    @property
    def unshared(self) -> dict[str, Any]:
        """Those of the numbers that the host counts."""
        return {name: value for name, value in self._numbers.items() if name not in self.shared}

    def count(self, carried: dict[str, Any]) -> None:
        """Note here that a step was counted."""
        # Where no step is kept, all that is known is that there was one.
        count = self._numbers["step"] + 1 if self._counts else 1
        self._numbers = {"step": count} | {name: v for name, v in carried.items() if not isinstance(v, Tensor)}

    def advance(self, carried: dict[str, Any], skip: Tensor | None = None) -> None:
        """Count a step.

        Args:
            carried: what the state carries on.
            skip: 0-dim, on the device: 1 where the step was none.
        """
        self.count(carried)
        if self._counts and "step" not in self.shared:
            for m in self.members:
                m.state["step"] = self._numbers["step"]
        for name, value in carried.items():
            if name not in self.shared or requires_grad(value):  # replaced, as a graph holds the last one
                for m in self.members:
                    m.state[name] = value
        for name, value in self.shared.items():
            if name == "step" and skip is None and name in self._cells:
                self._cell(name).value += 1
            elif name == "step":
                value.add_(1 if skip is None else 1 - skip)
            elif requires_grad(carried[name]):
                continue
            elif skip is not None:
                value.copy_(torch.where(skip != 0, value, carried[name]))
            elif isinstance(carried[name], Tensor):
                value.copy_(carried[name])
            else:
                value.fill_(carried[name])

    def count_average(self, skip: Tensor | None) -> None:
        """Count a step in which the parameters stayed as they were."""
        if COUNT in self._numbers:
            self._numbers |= {COUNT: self._numbers[COUNT] + 1}
        self.shared[COUNT].add_(1 if skip is None else 1 - skip)
