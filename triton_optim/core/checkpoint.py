"""What becomes of an optimizer's states when they are saved and loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..buckets.step_scalars import scalar_state_dtype
from ..engine.prologue import check_states
from ..options import OPTIONS
from ..precision.codecs import (
    CODES_VERSION,
    HALVES,
    PRECISION,
    RESIDUALS,
    SCALE,
    codes,
    in_blocks,
    new_parts,
    part_names,
    read,
    with_residual,
)
from ..precision.kept import check_state, current_codec
from ..spec import AVERAGE, COUNT, Update
from ..util.layout import local
from .foreign import origin, refusal

# What a group has only where it was asked for.
OPTIONAL = (*PRECISION, "seed", "ema_decay", "ema_warmup")

# What is saved of a quantized state, under its name: no other reader takes a dict for a tensor, whatever its shape.
CODES = ("codes", SCALE, "bits", "signed", "block", "version")

AGAIN = "Load the state dict as it was saved."


def elementwise_names(optimizer: Update) -> list[str]:
    """The states of all variants that have an item for each element of the parameter."""
    return list(dict.fromkeys([*chain.from_iterable(v.state_names for v in optimizer.variants), AVERAGE]))


def numbered(optimizer: Update, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """The parameters, with what the state dict calls each."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


# Saving.


def saved_state(optimizer: Update, state: Any, p: Tensor) -> Any:
    """A state as it is saved: with numbers that share memory with no other's, and codes that say how they are read."""
    saved = with_own_memory(state)
    for name in elementwise_names(optimizer):
        if f"{name}_{SCALE}" not in state or (codec := current_codec(optimizer, state, name, p)) is None:
            continue
        scale = saved.pop(f"{name}_{SCALE}")
        if codec.block_size:  # else a value was put in place of codes, and their scales are left over
            kept = (
                state[name],
                scale,
                8 // codec.elements_per_item[0],
                int(name not in optimizer.nonnegative),
                codec.block_size,
            )
            saved[name] = dict(zip(CODES, (*kept, CODES_VERSION), strict=True))
    return saved


def with_own_memory(values: Any) -> Any:
    """A parameter's state with numbers that share memory with no other's, as counted ones do."""
    if not isinstance(values, dict):
        return values
    return {name: v.clone() if isinstance(v, Tensor) and not v.dim() else v for name, v in values.items()}


def as_saved(optimizer: Update, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of ``state_dict``."""
    # Loaded into torch.optim, steps that share memory would each be counted once for every one of them.
    params = dict(numbered(optimizer, state_dict))
    states = {
        i: saved_state(optimizer, state, params[i]) if i in params else with_own_memory(state)
        for i, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


# Loading.


def loaded_state(optimizer: Update, index: Any, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A state as it is held, from how it was saved.

    Raises:
        RuntimeError: its codes are not those of so many elements, or of a version that is not known, or hold what the
            optimizer says they never do.
    """
    names = elementwise_names(optimizer)
    held: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict) and name in names:
            held |= held_codes(optimizer, index, p, name, value)
        elif value != {} or not name.endswith(SCALE):  # of scales, too, DCP's flat form asks by the names that are held
            held[name] = value
    return held


def held_codes(optimizer: Update, index: Any, p: Tensor, name: str, saved: dict[str, Any]) -> dict[str, Any]:
    """The parts, by name, of a quantized state that was saved."""
    where = f"{name} of parameter {index}"
    tensors = all(isinstance(saved.get(part), Tensor) for part in CODES[:2])
    if saved.keys() != {*CODES} or not tensors or saved["bits"] not in (4, 8):
        raise RuntimeError(f"{where} was saved as {saved!r:.80}; a quantized state is a dict of {list(CODES)}. {AGAIN}")
    if saved["version"] != CODES_VERSION:
        raise RuntimeError(
            f"{where} was quantized by version {saved['version']}, this triton_optim reads version {CODES_VERSION}. "
            "Load it where it was saved, and save to_torch_state_dict(optimizer) there."
        )
    parts = {name: saved["codes"], f"{name}_{SCALE}": saved[SCALE]}
    own = current_codec(optimizer, parts, name, p)
    codec = in_blocks(codes(f"int{saved['bits']}", not saved["signed"]), saved["block"])
    if own is None or own._replace(name=codec.name) != codec:
        raise RuntimeError(
            f"{where} is said to be {saved['bits']} bits in blocks of {saved['block']}; there are "
            f"{saved['codes'].numel():,} items of {saved['codes'].dtype} and {saved[SCALE].numel():,} scales of "
            f"{saved[SCALE].dtype}. {AGAIN}"
        )
    check_state(optimizer, index, p, name, parts)
    if own == codec:
        return parts
    value = read(codec, list(parts.values()), local(p))
    if saved["signed"] and bool((value < 0).any()):
        raise RuntimeError(
            f"{where} was saved with signs and holds negative numbers; `nonnegative` of {type(optimizer).__name__} "
            "says that it never does. Take it out of `nonnegative`, or load a state dict of this optimizer."
        )
    return dict(zip((name, *part_names(own, name)), new_parts(own, value), strict=True))


def loaded_groups(optimizer: Update, state_dict: Any) -> list[dict[str, Any]]:
    """The groups of a state dict. How values are kept is this optimizer's own: the next step brings what is loaded
    into it.
    """
    return [
        {name: own[name] for name in ("seed", "ema_decay", "ema_warmup") if name in own}
        | {name: value for name, value in saved.items() if name not in PRECISION}
        | {name: own[name] for name in PRECISION if name in own}
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]


def loaded_states(optimizer: Update, state_dict: Any) -> dict[Any, Any]:
    """The states of a state dict, by what it calls the parameters, as they will be held.

    Raises:
        What :meth:`RuleOptimizer.load_state_dict` says of a state dict that does not fit.
    """
    check_groups(optimizer, state_dict)
    params: dict[Any, Tensor] = {}
    for i, p in numbered(optimizer, state_dict):
        if params.setdefault(i, p) is not p:
            raise ValueError(f"the groups of the state dict list parameter {i} twice. {AGAIN}")
    unknown = [i for i in state_dict["state"] if isinstance(i, int) and i not in params]
    if unknown:
        raise ValueError(
            f"the state dict has states of parameters {unknown}, and its groups are of {list(params)}. {AGAIN}"
        )
    states = dict(state_dict["state"])
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group = filled(optimizer, saved)
        for i, p in zip(saved["params"], own["params"], strict=True):
            if i in states:
                states[i] = checked_state(optimizer, group, i, p, state_dict["state"][i])
    return states


def check_keys(state_dict: Any) -> None:
    """Raise where a state dict is none."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict is a dict, and this a {type(state_dict).__name__}. {AGAIN}")
    if not {"state", "param_groups"} <= state_dict.keys():
        found = sorted(map(str, state_dict))
        raise KeyError(f"a state dict has the keys 'state' and 'param_groups', and this {found}. {AGAIN}")


def check_groups(optimizer: Update, state_dict: Any) -> None:
    """Raise where a state dict is none, or that of another library, or its groups are not those of the optimizer."""
    check_keys(state_dict)
    name = type(optimizer).__name__
    states, groups = state_dict["state"], state_dict["param_groups"]
    whole = isinstance(groups, (list, tuple)) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups
    )
    if not whole or not isinstance(states, Mapping):
        raise ValueError(
            "'state' is a dict of states by parameter, 'param_groups' a list of dicts, each with a list 'params'; here "
            f"they are {states!r:.80} and {groups!r:.80}. {AGAIN}"
        )
    if library := origin(state_dict):
        raise ValueError(refusal(library, name))
    saved, own = ([len(group["params"]) for group in which] for which in (groups, optimizer.param_groups))
    if saved != own:
        what = (
            "a different number of parameter groups"
            if len(saved) != len(own)
            else "a parameter group that doesn't match the size of optimizer's group"
        )
        raise ValueError(
            f"loaded state dict has {what}: its groups are of {saved} parameters, those of {name} of {own}. Load one "
            "saved with the same parameters."
        )
    for number, group in enumerate(groups):
        # An option may be newer than the checkpoint; a hyperparameter can't be.
        numbers = {name for name, value in optimizer.defaults.items() if not isinstance(value, (bool, type(None)))}
        needed = sorted(numbers - {*OPTIONAL})
        if missing := [name for name in needed if name not in group]:
            raise KeyError(
                f"group {number} of the state dict holds {sorted(group)} and lacks {missing}: it is not one of "
                f"{name}'s. Load it into the optimizer that saved it."
            )


def checked_state(optimizer: Update, group: dict[str, Any], index: Any, p: Tensor, state: Any) -> dict[str, Any]:
    """:func:`loaded_state` of a parameter in `group`, in which all that the optimizer knows is as it must be."""
    name = type(optimizer).__name__
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of parameter {index} is {state!r:.80}, no dict of states by name. {AGAIN}")
    counted = {"step", *chain.from_iterable(map(optimizer.scalar_state_names, optimizer.param_groups))}
    elementwise = elementwise_names(optimizer)
    known = counted | {*elementwise} | {*optimizer.prologue_names}
    parts = {*RESIDUALS, COUNT, *(f"{name}_{SCALE}" for name in elementwise)}
    # Names that optimizers share, such as step, prove nothing where others are in place of ours.
    complete = any(state.keys() >= {*variant.state_names} for variant in optimizer.variants)
    if state and (not (known | parts) & state.keys() or (state.keys() - known - parts and not complete)):
        raise ValueError(
            f"the state of parameter {index} holds {sorted(state)}, {name} keeps {sorted(known)}: this state dict is "
            "of another optimizer. Load it into that one."
        )
    for part in elementwise:
        if isinstance(state.get(f"{part}_{SCALE}"), Tensor):
            raise RuntimeError(
                f"{part} of parameter {index} is quantized and does not say how: its scale is a state of "
                "its own. Load the optimizer's state_dict(), or to_torch_state_dict(optimizer) of where it was saved."
            )
    held = loaded_state(optimizer, index, p, dict(state))
    there = {part: value for part, value in held.items() if value is not None}
    for part, value in there.items():
        if isinstance(value, Tensor):
            check_tensor(index, p, part, value)
        if part in counted or part == COUNT:
            check_number(index, part, value, whole=part in ("step", COUNT))
        elif part in elementwise:
            check_state(optimizer, index, p, part, held)
        elif part in RESIDUALS or part in optimizer.prologue_names:
            check_part(index, p, part, value)
    if optimizer.prologue_names:
        check_states(optimizer, group, index, p, held)
    check_complete(optimizer, group, index, p, there)
    return held


def check_tensor(index: Any, p: Tensor, name: str, value: Tensor) -> None:
    """Raise RuntimeError where a tensor has no numbers of its own to load."""
    own = local(value)
    kind = type(own)
    if hasattr(own, "__tensor_flatten__") and kind is not type(local(p)):
        raise RuntimeError(
            f"{name} of parameter {index} is a {kind.__module__}.{kind.__qualname__}, which keeps its numbers in a way "
            "of its own. Load triton_optim.convert_state_dict(optimizer, state_dict)."
        )
    if own.layout != torch.strided or (own.is_meta and not local(p).is_meta):
        what = "is on meta and has no numbers" if own.is_meta else f"is {own.layout}, not dense"
        raise RuntimeError(f"{name} of parameter {index} {what}. {AGAIN}")


def check_number(index: Any, name: str, value: Any, whole: bool) -> None:
    """Raise RuntimeError where a scalar state is no number, or a count is none."""
    number = value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        number = value.item()
    fits = isinstance(number, Real)
    if fits and whole:
        fits = math.isfinite(number) and number >= 0 and number % 1 == 0
    if not fits:
        kind = "a count of steps, 0 or more" if whole else "a number"
        raise RuntimeError(f"{name} of parameter {index} is {value!r:.80}; it must be {kind}. {AGAIN}")


def check_part(index: Any, p: Tensor, name: str, value: Any) -> None:
    """Raise RuntimeError where a correction of a parameter, or what a prologue keeps, is no such tensor."""
    if name in RESIDUALS and p.dtype in HALVES:
        codec = with_residual(RESIDUALS[name], p.dtype)
        fits = isinstance(value, Tensor) and value.dtype == codec.dtypes[1 + codec.suffixes.index(name)]
    else:
        fits = isinstance(value, Tensor) and value.is_floating_point()
    if not fits or (name in RESIDUALS and value.shape != p.shape):
        found = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
        raise RuntimeError(
            f"{name} of parameter {index} is {found}, the parameter {p.dtype}, {tuple(p.shape)}. Load a state dict of "
            "a model of the same shapes and dtypes; master_state_dict has the weights for others."
        )


def check_complete(optimizer: Update, group: dict[str, Any], index: Any, p: Tensor, state: dict[str, Any]) -> None:
    """Raise ValueError where a state that has been started lacks what the group's variant keeps."""
    variant = optimizer.variant(group)
    needed = {*variant.state_names}
    if variant.prologue and optimizer.prologue_names:
        needed |= optimizer.prologue_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group).keys()
    if needed & state.keys() or (optimizer.counts_steps and "step" in state):
        needed |= {"step"} if optimizer.counts_steps else set()
        needed |= optimizer.first_scalar_states(group).keys() - {COUNT}
    else:
        needed = set()
    for one, other in ((AVERAGE, COUNT), (COUNT, AVERAGE), ("residual_low", "residual")):
        needed |= {other} if one in state else set()
    if missing := sorted(needed - state.keys()):
        raise ValueError(
            f"the state of parameter {index} holds {sorted(state)} and lacks {missing}: {type(optimizer).__name__} "
            f"can't go on from it. {AGAIN}"
        )


def restore_dtypes(optimizer: Update, loaded: dict[str, Any]) -> None:
    """Give the states the dtypes in which they were saved, and the numbers among them theirs."""
    counted = {"step", COUNT, *chain.from_iterable(map(optimizer.scalar_state_names, optimizer.param_groups))}
    for i, p in numbered(optimizer, loaded):
        for name, value in loaded["state"].get(i, {}).items():
            if name in counted:
                optimizer.state[p][name] = value  # torch has cast all but step
                own_number(optimizer, p, name)
            elif isinstance(value, Tensor) and value.dtype != optimizer.state[p][name].dtype:
                optimizer.state[p][name] = value.to(p.device, copy=True)


def group_of(optimizer: Update, p: Tensor) -> dict[str, Any]:
    """The parameter group that `p` is in."""
    return next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))


def own_number(optimizer: Update, p: Tensor, name: str) -> None:
    """Make a state that is a number what it must be: a tensor of its own, of the right dtype, where it belongs."""
    group, value = group_of(optimizer, p), optimizer.state[p][name]
    if name == "step" and not optimizer.step_is_tensor:
        optimizer.state[p][name] = int(value)
        return
    device = p.device if group.get("capturable") or optimizer.counts_on_device else torch.device("cpu")
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")
    optimizer.state[p][name] = value.to(device, scalar_state_dtype(group, name), copy=True).reshape(())


def filled(optimizer: Update, group: Mapping[str, Any]) -> dict[str, Any]:
    """The group of a checkpoint, with what it lacks because it is older."""
    written = inspect.signature(type(optimizer).__init__).parameters
    full = dict(group)
    # A checkpoint from before an option existed lacks its key, and was made with what is its default now.
    for name, value in optimizer.defaults.items():
        if name in OPTIONS and name not in optimizer.option_names:
            continue  # a group has it only where it was asked for
        default = written[name].default if name in written else OPTIONS.get(name, value)
        full.setdefault(name, value if default is inspect.Parameter.empty else default)
    return full


def fill_in(optimizer: Update) -> None:
    """Give the groups and states of a checkpoint what they lack because it is older."""
    for group in optimizer.param_groups:
        group.update(filled(optimizer, group))
        for p in group["params"]:
            for name in optimizer.scalar_state_names(group):
                if name in optimizer.state.get(p, ()) and not isinstance(optimizer.state[p][name], Tensor):
                    own_number(optimizer, p, name)
