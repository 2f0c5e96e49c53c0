"""Packs an optimizer's states into a state dict, and makes states of one that is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from operator import eq
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..buckets.state import WatchedState
from ..buckets.step_scalars import scalar_state_dtype
from ..engine.probe import Probe
from ..engine.processes import in_process_group
from ..options import OPTIONS, saved_dtype
from ..precision.codecs import PRECISION, STATE_CODES, Codec, state_codec
from ..precision.kept import convert_state, current_codec
from ..spec import Update, states_device
from ..util.devices import moved
from ..util.layout import local
from .loadable import Checks
from .saved_form import AGAIN, names_of, saved_states

CPU = torch.device("cpu")


def packed(optimizer: Update) -> dict[str, Any]:
    """The state dict, as torch packs it: parameters are their numbers.

    In a process group it is one that torch.distributed.checkpoint loads into any choice of ``state_dtype``: values
    stand in place of codes. Ranks gather them one after the other, and may have made them in another order.
    """
    grouped = in_process_group()
    numbers_of: dict[int, int] = {}
    groups, start = [], 0
    for group in optimizer.param_groups:
        params = group["params"]
        end = start + len(params)
        own = dict(zip(map(id, params), range(start, end), strict=True))
        if numbers_of.keys().isdisjoint(own):
            numbers_of = numbers_of | own if numbers_of else own
        else:
            numbers_of |= {p: i for p, i in own.items() if p not in numbers_of}
        numbers = list(own.values()) if len(numbers_of) == end else [numbers_of[id(p)] for p in params]
        kept = {name: saved_dtype(value) for name, value in group.items() if name != "params"}
        groups.append(kept | {"params": numbers})
        start = end
    keys: Any = range(start)  # most often each parameter has a state, in their order
    same = len(optimizer.state) == len(numbers_of) == start
    if not (same and all(map(eq, map(id, optimizer.state), numbers_of))):
        keys = [numbers_of[id(key)] if isinstance(key, Tensor) else key for key in optimizer.state]
    states = dict(zip(keys, saved_states(optimizer, optimizer.state, decoded=grouped), strict=True))
    if grouped:
        states = {i: states[i] for i in range(start) if i in states} | states
    return {"state": states, "param_groups": groups}


def numbered(optimizer: Update, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """The parameters, with what the state dict calls each."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


def without_left(optimizer: Update, probe: Probe, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict without the float32 copies that a probe made of other weights, and no checkpoint has replaced.

    Into empty shards nothing is loaded in any case: theirs go with the others, so that all ranks have the same states.
    """
    states = dict(state_dict["state"])
    pairs = numbered(optimizer, state_dict) if probe else ()
    masters = {i: (p, states[i].get("master")) for i, p in pairs if isinstance(states.get(i), Mapping)}
    left = [i for i, (p, master) in masters.items() if probe.left(p, "master", master)]
    if any(local(masters[i][1]).numel() for i in left):
        states |= {i: {name: value for name, value in states[i].items() if name != "master"} for i in left}
    return {**state_dict, "state": states}


def loaded_groups(optimizer: Update, state_dict: Any) -> list[dict[str, Any]]:
    """The groups of a state dict. How values are kept is this optimizer's own: the next step brings what is loaded
    into it.
    """
    stay = ("seed", "ema_decay", "ema_warmup", *optimizer.group_names)
    return [
        {name: own[name] for name in stay if name in own}
        | {name: value for name, value in saved.items() if name not in (*PRECISION, "offload")}
        | {name: own[name] for name in (*PRECISION, "offload") if name in own}
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]


def loaded_states(optimizer: Update, state_dict: Any, groups: list[dict[str, Any]]) -> dict[Any, Any]:
    """The states of a state dict as they will be held, by parameter; what is of no parameter by its name.

    Args:
        groups: those of the optimizer as they will be.

    Raises:
        What :meth:`RuleOptimizer.load_state_dict` says of a state dict that does not fit.
    """
    given, names, defaults = state_dict["state"], names_of(optimizer), defaults_of(optimizer)
    params: dict[Any, Tensor] = {}
    for i, p in numbered(optimizer, state_dict):
        if params.setdefault(i, p) is not p:
            raise ValueError(f"the groups of the state dict list parameter {i} twice. {AGAIN}")
    unknown = [i for i in given if isinstance(i, int) and i not in params]
    if unknown:
        raise ValueError(
            f"the state dict has states of parameters {unknown}, and its groups are of {list(params)}. {AGAIN}"
        )
    states = {}
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        checks = Checks(optimizer, names, filled(saved, defaults))
        for i, p in zip(saved["params"], own["params"], strict=True):
            if i in given:
                states[i] = checks.checked(i, p, given[i])
    # All fit.
    for own, saved, new in zip(optimizer.param_groups, state_dict["param_groups"], groups, strict=True):
        group = filled(new, defaults)
        dtypes = {name: scalar_state_dtype(optimizer, group, name) for name in names.numbers}
        for i, p in zip(saved["params"], own["params"], strict=True):
            if i in given:
                states[i] = ready_state(optimizer, group, dtypes, p, states[i])
                encode_states(optimizer, group, p, states[i])
    return {params.get(i, i): WatchedState(states[i]) if i in states else state for i, state in given.items()}


def ready_state(
    optimizer: Update, group: dict[str, Any], dtypes: dict[str, torch.dtype], p: Tensor, state: dict[str, Any]
) -> dict[str, Any]:
    """A state that fits, where it belongs: its numbers copied, the rest in the dtypes in which it was saved."""
    device, dtype = states_device(group, p), p.dtype
    for name, value in state.items():
        if name in dtypes:
            state[name] = own_number(optimizer, group, p, name, value, dtypes[name])
        elif isinstance(value, Tensor):
            # Torch makes the states of a state dict the optimizer's own where they are of the parameter's dtype.
            if value.dtype != dtype or value.device != device:
                state[name] = value.to(device, copy=value.dtype != dtype and not dtype.is_complex)
        else:
            state[name] = moved(value, device)
    return state


def encode_states(optimizer: Update, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
    """Make codes of the states that a group keeps so: until the next step all would be there in float32."""
    if group.get("state_dtype") not in STATE_CODES or is_lazy(p):
        return
    for name, codec in wanted_codecs(optimizer, group, p, state):
        if codec.block_size:
            convert_state(optimizer, state, name, p, codec)


def wanted_codecs(
    optimizer: Update, group: dict[str, Any], p: Tensor, state: dict[str, Any]
) -> Iterator[tuple[str, Codec]]:
    """The states of a parameter that are there and have an item for each element, and how its group keeps them."""
    variant = optimizer.running_variant(group)
    for name in (*variant.state_names, *(optimizer.coded_names if variant.prologue else ())):
        held = current_codec(optimizer, state, name)
        if held is not None:
            yield name, state_codec(optimizer, group, name, p, held)


def own_number(
    optimizer: Update, group: dict[str, Any], p: Tensor, name: str, value: Any, dtype: torch.dtype
) -> Tensor | int | None:
    """A state of `p` that is a number as it must be: a tensor of its own, of this dtype, where it belongs."""
    if value is None:
        return None
    if name == "step" and not optimizer.step_is_tensor:
        return int(value)
    device = p.device if group.get("capturable") or optimizer.counts_on_device else CPU
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=dtype, device=device)
    own: Tensor = value.detach() if value.requires_grad else value
    same = own.dtype == dtype and own.device == device
    own = own.clone() if same else own.to(device, dtype, copy=True)  # the first takes half as long
    return own.reshape(()) if own.dim() else own


def defaults_of(optimizer: Update) -> dict[str, Any]:
    """What the groups of a checkpoint that lack an option were made with: it is older than the option."""
    written = inspect.signature(type(optimizer).__init__).parameters
    defaults = {}
    for name, value in optimizer.defaults.items():
        if name in OPTIONS and name not in optimizer.option_names:
            continue  # a group has it only where it was asked for
        default = written[name].default if name in written else OPTIONS.get(name, value)
        defaults[name] = value if default is inspect.Parameter.empty else default
    return defaults


def filled(group: Mapping[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The group of a checkpoint, with what it lacks."""
    full = dict(group)
    for name, value in defaults.items():
        full.setdefault(name, value)
    return full


def fill_in(optimizer: Update) -> None:
    """Give the groups and states of a checkpoint what they lack because it is older."""
    defaults = defaults_of(optimizer)
    for group in optimizer.param_groups:
        group.update(filled(group, defaults))
        dtypes = {name: scalar_state_dtype(optimizer, group, name) for name in optimizer.scalar_state_names(group)}
        for p in group["params"] if dtypes else ():
            state = optimizer.state.get(p, {})
            for name, dtype in dtypes.items():
                if name in state and not isinstance(state[name], Tensor):
                    state[name] = own_number(optimizer, group, p, name, state[name], dtype)
