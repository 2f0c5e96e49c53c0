"""A parameter in a plan, and the states that its first step makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..precision.averaging import initial_average, value_of
from ..precision.codecs import Codec, new_parts, part_names, state_codec
from ..precision.kept import convert_parameter, convert_state, current_codec, current_parameter_codec
from ..spec import AVERAGE, COUNT, Update, first_value, states_device
from ..util.layout import made_in_inference_mode, with_local
from .column import Column
from .key import Key
from .state import WatchedState
from .step_scalars import requires_grad, scalar_state_dtype

CPU = torch.device("cpu")


class ParamSlot:
    """A parameter in a plan.

    Attributes:
        param: the parameter.
        p: what a step reads and writes: the parameter, or host memory in its place.

    Args:
        averaged: of how many values the averages are that others have so far.
    """

    __slots__ = ("alone", "begins", "cell", "columns", "given", "group", "index", "numbers", "p", "param", "state")

    def __init__(self, optimizer: Update, index: int, group: int, p: Tensor, averaged: Callable[[], float]) -> None:
        self.index, self.group, self.param, self.p = index, group, p, p
        self.given: set[str] = set()  # the numbers that were tensors before: a user who holds one sees it updated
        self.columns: dict[str, Column] = {}  # those in which its numbers are a cell: see step_groups.place
        self.cell = 0
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
            started[COUNT] = averaged()
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
