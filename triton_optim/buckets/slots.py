"""A parameter in a plan, and the parameters of a group at the same step, which share a row of scalars."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..precision.averaging import initial_average, value_of
from ..precision.codecs import Codec, new_parts, part_names, state_codec
from ..precision.kept import convert_parameter, convert_state, current_codec, current_parameter_codec
from ..spec import AVERAGE, COUNT, Update, first_value, states_device
from ..util.layout import made_in_inference_mode, with_local
from .key import Key
from .state import WatchedState
from .step_scalars import requires_grad, scalar_state_dtype

CPU = torch.device("cpu")
_STEP = {"step"}
_CODES = {torch.float32: "f", torch.float64: "d"}


class ParamSlot:
    """A parameter in a plan.

    Attributes:
        param: the parameter.
        p: what a step reads and writes: the parameter, or host memory in its place.
    """

    __slots__ = ("alone", "begins", "given", "group", "index", "numbers", "p", "param", "state")

    def __init__(self, optimizer: Update, index: int, group: int, p: Tensor) -> None:
        self.index, self.group, self.param, self.p = index, group, p, p
        self.given: set[str] = set()  # the numbers that were tensors before: a user who holds one sees it updated
        self.alone = 0  # not 0 where its numbers are in memory that processes share: they stay there, with no others
        self.state: dict[str, Any] = optimizer.state.get(p, WatchedState())
        own_group = optimizer.param_groups[group]
        # Of a rule that does not count its steps all that matters is whether it has made one: its states say so, not
        # the count, nor what else the options of the group keep.
        names = optimizer.variant(own_group).state_names
        begun = any(self.state.get(name) is not None for name in names)
        self.begins = bool(names) and not begun and not optimizer.counts_steps
        count = 0 if self.begins else int(self.state.get("step", begun and not optimizer.counts_steps))
        started = optimizer.first_scalar_states(own_group)
        if COUNT in started and self.state.get(AVERAGE) is None:
            started[COUNT] = optimizer.averaged_so_far()
        # The number of steps so far, and the other scalar states: parameters that have these in common share scalars.
        self.numbers: dict[str, Any] = {"step": count}
        for name, value in started.items():
            held = self.state.get(name, value)
            # What autograd is to follow stays the tensor it is.
            follows = own_group.get("differentiable") and requires_grad(held)
            self.numbers[name] = held if follows else float(held)

    def start(self, optimizer: Update, key: Key, begun: dict[Any, Tensor]) -> None:
        """Make the states that are missing, and tensors of ``step`` and the other scalar states, on their devices.

        Args:
            begun: tensors of numbers, for all parameters of a plan: a step group will give each its own.
        """
        group = optimizer.param_groups[self.group]
        counted = optimizer.scalar_state_names(group)
        param, *kept = key.codecs
        if not (key.variant.state_names or counted or key.variant.staged or param.suffixes or self.state):
            return
        self.state = optimizer.state[self.param]
        self._bring_states(counted)
        device = self.p.device if key.capturable or optimizer.counts_on_device else CPU
        for name in counted:
            if requires_grad(self.numbers.get(name)):
                continue
            if name == "step" and not optimizer.step_is_tensor:
                self.state[name] = self.numbers[name]
                continue
            held = self.numbers[name] if name == "step" and self.begins else self.state.get(name, self.numbers[name])
            dtype = scalar_state_dtype(optimizer, group, name)
            if isinstance(held, Tensor):
                held = held.to(device, dtype)
                held = held.reshape(()) if held.dim() else held
                if device == CPU and held.is_shared():  # type: ignore[no-untyped-call]
                    self.alone = id(self)
                if not (id(held) in begun or made_in_inference_mode(held) or held.requires_grad):
                    begun[id(held)] = held  # another parameter's is another
                    self.given.add(name)
                self.state[name] = held
            else:
                if (held, dtype, device) not in begun:
                    begun[held, dtype, device] = torch.tensor(held, dtype=dtype, device=device)
                self.state[name] = begun[held, dtype, device]
        convert_parameter(self.state, self.p, param)
        for name, codec in zip(key.variant.state_names, kept, strict=True):
            if self.state.get(name) is None:
                self.state |= new_state(optimizer, self.state, name, self.p, group, codec)
            else:
                convert_state(optimizer, self.state, name, self.p, codec)
        if key.variant.staged:
            start_kept(optimizer, self.state, self.p, group, coded=key.variant.prologue)

    def _bring_states(self, counted: list[str]) -> None:
        """Move states that are elsewhere to where the step is made."""
        for name, value in list(self.state.items()):
            if isinstance(value, Tensor) and name not in counted and value.device != self.p.device:
                self.state[name] = value.to(self.p.device)


class Cells:
    """The memory of a column on the CPU, written and compared where it lies: an operation of torch takes longer than
    all else that is done to it. Nothing of its size is allocated: to ask for 4 kB takes up to 0.3 ms after a backward
    pass, as glibc then tidies up the many small pieces that were freed.
    """

    __slots__ = ("_after", "_before", "_bits", "_code", "_values", "_written")

    def __init__(self, column: Tensor) -> None:
        memory = memoryview((ctypes.c_char * column.nbytes).from_address(column.data_ptr())).cast("B")
        self._code = _CODES[column.dtype]
        self._values: Any = memory.cast(self._code)  # type: ignore[call-overload]
        self._bits: Any = memory.cast("I") if column.itemsize == 4 else memory.cast("Q")  # NaN is unlike itself
        self._before, self._after = self._bits[:-1], self._bits[1:]
        self._written = 0

    def untouched(self) -> bool:
        """Whether all cells hold what was written last."""
        return bool(self._bits[0] == self._written and self._before == self._after)

    def write(self, value: float) -> float:
        """Write it into all cells; returns it as they keep it."""
        values = self._values
        some = array(self._code, (value,)) * min(len(values), 128)
        for start in range(0, len(values), 128):
            values[start : start + 128] = some[: len(values) - start]
        self._written = self._bits[0]
        return float(values[0])


class StepGroup:
    """Parameters of one group whose steps were counted alike, and so share one row of scalars.

    Their ``step`` tensors, and those of the other scalar states, are elements of one column: incrementing a thousand
    tensors would cost more than all other host work of a step. What a user writes into one of them is noticed.

    Attributes:
        columns: by name, ``(parameters,)``, where the parameters' own numbers lie.
    """

    def __init__(
        self,
        group: int,
        numbers: dict[str, Any],
        counted: list[str],
        slots: list[ParamSlot],
        positions: list[int],
        captured: bool = False,
    ) -> None:
        self.group, self.slots, self.positions = group, slots, positions
        self._numbers = numbers
        self._counts = "step" in counted
        self.columns: dict[str, Tensor] = {}
        self._cells: dict[str, Cells] = {}  # those on the CPU
        for name in counted:
            first = slots[0].state.get(name)
            if isinstance(first, Tensor) and not requires_grad(numbers.get(name)):
                with torch.inference_mode(False):  # later steps may be made outside of it
                    shared = slots[0].alone and first.is_shared()  # type: ignore[no-untyped-call]
                    column = first.detach().view(1) if shared else first.detach().expand(len(slots)).clone()
                self.columns[name] = column
                here = column.device == CPU and not captured  # what is written past torch is in no graph
                each = apart(column) if here else column.unbind()
                for m, own in zip(slots, () if shared else each, strict=not shared):
                    if here and name in m.given:
                        m.state[name].data = own
                    else:
                        m.state[name] = own  # which counts writes with the column
                if here:
                    self._write(name, numbers[name])
        # Whether all that is counted is `step`, and that on the CPU.
        self._only_steps = self._cells.keys() == self.columns.keys() == (_STEP if self._counts else set())
        self._torchs = [t for name, t in self.columns.items() if name not in self._cells]
        self._versions = [t._version for t in self._torchs]

    def untouched(self) -> bool:
        """Whether nobody else has written the parameters' numbers since the last step. They must lie where they did."""
        for cells in self._cells.values():
            if not cells.untouched():
                return False
        return not self._torchs or self._versions == [t._version for t in self._torchs]

    @property
    def counted(self) -> tuple[Any, ...]:
        """What the parameters of the group that share a row have in common."""
        return (self.group, *self._numbers.values())

    def numbers(self, on_device: bool = False) -> dict[str, Any]:
        """The scalar states, ``step`` first, as they are before the step; with `on_device` 0-dim float64 tensors."""
        if on_device:
            return self._numbers | {name: column[0].double() for name, column in self.columns.items()}
        if len(self._cells) == len(self.columns):
            return dict(self._numbers)
        # A device is not asked: the host would wait for it.
        here = {n: t[0].item() for n, t in self.columns.items() if n not in self._cells and t.device == CPU}
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
            for cells in self._cells.values():
                cells.write(count)
            self._numbers = {"step": count}  # others may have the old ones
            return
        self.count(scalar_state)
        if self._counts and "step" not in self.columns:
            for m in self.slots:
                m.state["step"] = self._numbers["step"]
        for name, value in scalar_state.items():
            if name not in self.columns or requires_grad(value):  # replaced, as a graph holds the last one
                for m in self.slots:
                    m.state[name] = value
        for name, column in self.columns.items():
            if requires_grad(scalar_state.get(name)):
                continue
            if name in self._cells:
                self._write(name, self._numbers[name] if name in self._numbers else scalar_state[name])
            elif name == "step":
                column.add_(1 if skip is None else 1 - skip)
            elif skip is not None:
                column.copy_(torch.where(skip != 0, column, scalar_state[name]))
            elif isinstance(scalar_state[name], Tensor):
                column.copy_(scalar_state[name])
            else:
                column.fill_(scalar_state[name])
        self._versions = [t._version for t in self._torchs]

    def _write(self, name: str, value: Any) -> None:
        """Give all parameters this number."""
        if name not in self._cells:
            self._cells[name] = Cells(self.columns[name])
        kept = self._cells[name].write(value)
        self._numbers[name] = int(value) if name == "step" else kept

    def count_average(self, skip: Tensor | None) -> None:
        """Count a step in which the parameters stayed as they were."""
        if COUNT in self._cells:
            self._write(COUNT, self._numbers[COUNT] + 1)
            return
        if COUNT in self._numbers:
            self._numbers |= {COUNT: self._numbers[COUNT] + 1}
        self.columns[COUNT].add_(1 if skip is None else 1 - skip)
        self._versions = [t._version for t in self._torchs]


def apart(column: Tensor) -> list[Tensor]:
    """0-dim tensors in the memory of a column on the CPU, each with a storage of its own: who saves one saves no
    other's memory.
    """
    memory = (ctypes.c_char * column.nbytes).from_address(column.data_ptr())
    memory.column = column  # type: ignore[attr-defined]  # which they hold so
    dtype, size = column.dtype, column.itemsize
    return [torch.frombuffer(memory, dtype=dtype, count=1, offset=i * size).squeeze_() for i in range(len(column))]


def new_state(
    optimizer: Update, own: dict[str, Any], name: str, p: Tensor, group: dict[str, Any], codec: Codec
) -> dict[str, Tensor]:
    """A state or average before the first step as `codec` keeps it: its parts by name.

    Args:
        own: what else is kept of the parameter.
    """
    if name == AVERAGE:
        first = initial_average(own, p, codec)
    else:
        rounded = bool(current_parameter_codec(own, p).suffixes)
        exact = with_local(p, value_of(own, p)) if rounded else None
        first = first_value(optimizer.declared[name], p, group, exact)
        if not isinstance(first, Tensor) or first.shape != p.shape or first.is_meta != p.is_meta:
            got = f"a {type(first).__name__}"
            got = f"shape {tuple(first.shape)} on {first.device}" if isinstance(first, Tensor) else got
            raise TypeError(
                f"{type(optimizer).__name__} starts its state {name} with {got}, beside a parameter of shape "
                f"{tuple(p.shape)} on {p.device}. Return a number, or a new tensor like the parameter."
            )
    return dict(zip((name, *part_names(codec, name)), new_parts(codec, first), strict=True))


def start_kept(optimizer: Update, state: dict[str, Any], p: Tensor, group: dict[str, Any], coded: bool) -> None:
    """Make what is missing of the states that come before the rule.

    Args:
        coded: whether a prologue has them: those like the parameter are made, or converted, as the group says.
    """
    for name in optimizer.coded_names if coded else ():
        codec = state_codec(optimizer, group, name, p, current_codec(optimizer, state, name))
        if state.get(name) is None:
            state |= new_state(optimizer, state, name, p, group, codec)
        else:
            convert_state(optimizer, state, name, p, codec)
    if not state.keys() >= {*optimizer.kept_names}:  # matrices are not made to be dropped
        state |= {name: value for name, value in optimizer.first_kept(p, group).items() if name not in state}


def make_states(optimizer: Update, group: dict[str, Any]) -> None:
    """Give the parameters of a group their states before their first step."""
    counted = {"step": 0} if "step" in optimizer.scalar_state_names(group) else {}
    for p in group["params"]:
        if is_lazy(p):  # the first step makes them
            continue
        started = counted | optimizer.first_scalar_states(group)
        own, value_of_p = optimizer.state[p], p.to(states_device(group, p))
        device = value_of_p.device if group.get("capturable") or optimizer.counts_on_device else CPU
        for name, value in started.items():
            dtype = scalar_state_dtype(optimizer, group, name)
            own[name] = torch.tensor(float(value), dtype=dtype, device=device)
        for name in optimizer.running_variant(group).state_names:
            codec = state_codec(optimizer, group, name, p)
            own |= new_state(optimizer, own, name, value_of_p, group, codec)
        start_kept(optimizer, own, value_of_p, group, coded=optimizer.running_variant(group).prologue)
