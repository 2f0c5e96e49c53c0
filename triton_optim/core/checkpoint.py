"""What becomes of an optimizer's states when they are saved and loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..buckets.state import State
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
from ..util.layout import ORDINARY, local
from .foreign import origin, refusal

# What a group has only where it was asked for.
OPTIONAL = (*PRECISION, "seed", "ema_decay", "ema_warmup")

# What is saved of a quantized state, under its name: no other reader takes a dict for a tensor, whatever its shape.
CODES = ("codes", SCALE, "bits", "signed", "block", "version")

# Of what kinds the values of a state are that is held as it is saved.
HELD = frozenset((*ORDINARY, int, float))

CPU = torch.device("cpu")
AGAIN = "Load the state dict as it was saved."


def elementwise_names(optimizer: Update) -> list[str]:
    """The states of all variants that have an item for each element of the parameter."""
    return list(dict.fromkeys([*chain.from_iterable(v.state_names for v in optimizer.variants), AVERAGE]))


class Names(NamedTuple):
    """What the states of an optimizer are called: found once, as thousands of parameters have them."""

    elementwise: list[str]
    scales: frozenset[str]  # of those, where they are quantized
    counted: frozenset[str]  # numbers, those that the groups have
    numbers: frozenset[str]  # and those that others may have


def names_of(optimizer: Update) -> Names:
    """What the states of any parameter may be called."""
    elementwise = elementwise_names(optimizer)
    scales = frozenset(f"{name}_{SCALE}" for name in elementwise)
    counted = {"step", *chain.from_iterable(map(optimizer.scalar_state_names, optimizer.param_groups))}
    return Names(elementwise, scales, frozenset(counted), frozenset(counted | {COUNT}))


# Saving.


def packed(optimizer: Update) -> dict[str, Any]:
    """The state dict, as torch packs it: parameters are their numbers."""
    places: dict[int, int] = {}
    groups, start = [], 0
    for group in optimizer.param_groups:
        params = group["params"]
        end = start + len(params)
        own = dict(zip(map(id, params), range(start, end), strict=True))
        places.update(own if places.keys().isdisjoint(own) else {p: i for p, i in own.items() if p not in places})
        numbers = list(own.values()) if len(places) == end else [places[id(p)] for p in params]
        groups.append({name: value for name, value in group.items() if name != "params"} | {"params": numbers})
        start = end
    keys: list[Any] = list(map(places.get, map(id, optimizer.state)))
    if None in keys:
        keys = [places[id(key)] if isinstance(key, Tensor) else key for key in optimizer.state]
    return {"state": dict(zip(keys, saved_states(optimizer, optimizer.state), strict=True)), "param_groups": groups}


def saved_states(optimizer: Update, states: Mapping[Any, Any]) -> list[Any]:
    """States as they are saved, in their order: with numbers that share memory with no other's, and codes that say how
    they are read.

    Loaded into torch.optim, numbers that share memory would each be counted once for every one of them; and who pickles
    one pickles all the memory that it is in.

    Args:
        states: by parameter, or by what else there may be states of.
    """
    names = names_of(optimizer)
    saved = [dict(state) if isinstance(state, dict) else state for state in states.values()]
    dicts = [state for state in saved if type(state) is dict]
    there: set[str] = set().union(*dicts)
    for name in there.difference(names.elementwise):
        having = [state for state in dicts if isinstance(value := state.get(name), Tensor) and not value.dim()]
        for state, value in zip(having, clones([state[name] for state in having]), strict=True):
            state[name] = value
    if not names.scales.isdisjoint(there):
        for p, state in zip(states, saved, strict=True):
            if isinstance(p, Tensor) and isinstance(state, dict) and not names.scales.isdisjoint(state):
                describe_codes(optimizer, names, state, p)
    return saved


def describe_codes(optimizer: Update, names: Names, state: dict[str, Any], p: Tensor) -> None:
    """Put what is saved of quantized states in the places of their codes and scales."""
    for name in names.elementwise:
        if f"{name}_{SCALE}" not in state or (codec := current_codec(optimizer, state, name, p)) is None:
            continue
        scale = state.pop(f"{name}_{SCALE}")
        if codec.block_size:  # else a value was put in place of codes, and their scales are left over
            bits, signed = 8 // codec.elements_per_item[0], int(name not in optimizer.nonnegative)
            kept = (state[name], scale, bits, signed, codec.block_size, CODES_VERSION)
            state[name] = dict(zip(CODES, kept, strict=True))


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each."""
    if set(map(type, tensors)) == {Tensor} and hasattr(torch, "_foreach_clone"):  # torch 2.9 has none
        return list(torch._foreach_clone(tensors))
    return [t.clone() for t in tensors]


# Loading.


def numbered(optimizer: Update, state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """The parameters, with what the state dict calls each."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


def loaded_state(optimizer: Update, index: Any, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as it is held, from how it was saved.

    Raises:
        RuntimeError: its codes are not those of so many elements, or of a version that is not known, or hold what the
            optimizer says they never do.
    """
    if HELD.issuperset(map(type, state.values())):  # as most are: nothing is quantized
        return dict(state)
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
        dtypes = {name: scalar_state_dtype(group, name) for name in names.numbers}
        for i, p in zip(saved["params"], own["params"], strict=True):
            if i in given:
                states[i] = ready_state(optimizer, group, dtypes, p, states[i])
    return {params.get(i, i): State(states[i]) if i in states else state for i, state in given.items()}


def ready_state(
    optimizer: Update, group: dict[str, Any], dtypes: dict[str, torch.dtype], p: Tensor, state: dict[str, Any]
) -> dict[str, Any]:
    """A state that fits, where it belongs: its numbers copied, the rest in the dtypes in which it was saved."""
    device, dtype = p.device, p.dtype
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


def moved(value: Any, device: torch.device) -> Any:
    """What is in a state besides tensors, with the tensors in it on this device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(v, device) for name, v in value.items()}
    return type(value)(moved(v, device) for v in value) if type(value) in (list, tuple) else value


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
    # An option may be newer than the checkpoint; a hyperparameter can't be.
    numbers = {name for name, value in optimizer.defaults.items() if not isinstance(value, (bool, type(None)))}
    needed = sorted(numbers - {*OPTIONAL})
    for number, group in enumerate(groups):
        if missing := [name for name in needed if name not in group]:
            raise KeyError(
                f"group {number} of the state dict holds {sorted(group)} and lacks {missing}: it is not one of "
                f"{name}'s. Load it into the optimizer that saved it."
            )


class Checks:
    """What the states of the parameters of a group must be to be loaded; what is the same for all is asked once.

    Args:
        optimizer: whose they will be.
        names: of its states.
        group: with all that the optimizer knows.
    """

    def __init__(self, optimizer: Update, names: Names, group: dict[str, Any]) -> None:
        self._optimizer, self._names, self._group = optimizer, names, group
        self._known: set[tuple[str, ...]] = set()  # states with these names are its
        self._complete: set[Any] = set()  # states with these names lack none

    def checked(self, index: Any, p: Tensor, state: Any) -> dict[str, Any]:
        """:func:`loaded_state` of a parameter, in which all that the optimizer knows is as it must be."""
        optimizer, names = self._optimizer, self._names
        if type(state) is not dict and not isinstance(state, Mapping):
            raise ValueError(f"the state of parameter {index} is {state!r:.80}, no dict of states by name. {AGAIN}")
        form = tuple(state)
        if form not in self._known:
            self._check_names(index, state)
            self._known.add(form)
        if not names.scales.isdisjoint(form):
            check_no_scales(names, index, state)
        held = loaded_state(optimizer, index, p, state)
        there: Any = tuple(held)
        for part, value in held.items():
            elementwise = part in names.elementwise
            if elementwise and is_like(p, value):  # as most are
                continue
            if value is None:
                there = tuple(name for name in there if name != part)
                continue
            if isinstance(value, Tensor):
                check_tensor(index, p, part, value)
            if part in names.numbers:
                check_number(index, part, value, whole=part in ("step", COUNT))
            elif elementwise:
                check_state(optimizer, index, p, part, held)
            elif part in RESIDUALS or part in optimizer.prologue_names:
                check_part(index, p, part, value)
        if optimizer.prologue_names:
            check_states(optimizer, self._group, index, p, held)
        form = (*there, p.shape, p.dtype) if optimizer.prologue_names else there
        if form not in self._complete:
            check_complete(optimizer, self._group, index, p, there)
            self._complete.add(form)
        return held

    def _check_names(self, index: Any, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a state has none of the optimizer's names, or others in place of them."""
        optimizer, names = self._optimizer, self._names
        known = {*names.counted, *names.elementwise, *optimizer.prologue_names}
        parts = {*RESIDUALS, COUNT, *names.scales}
        # Names that optimizers share, such as step, prove nothing where others are in place of ours.
        complete = any(state.keys() >= {*variant.state_names} for variant in optimizer.variants)
        if state and (not (known | parts) & state.keys() or (state.keys() - known - parts and not complete)):
            raise ValueError(
                f"the state of parameter {index} holds {sorted(state)}, {type(optimizer).__name__} keeps "
                f"{sorted(known)}: this state dict is of another optimizer. Load it into that one."
            )


def check_no_scales(names: Names, index: Any, state: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a quantized state does not say how it is read."""
    for part in names.elementwise:
        if isinstance(state.get(f"{part}_{SCALE}"), Tensor):
            raise RuntimeError(
                f"{part} of parameter {index} is quantized and does not say how: its scale is a state of "
                "its own. Load the optimizer's state_dict(), or to_torch_state_dict(optimizer) of where it was saved."
            )


def is_like(p: Tensor, value: Any) -> bool:
    """Whether a state is an ordinary tensor of real numbers, and like its parameter: all is well with it."""
    return (
        type(value) is Tensor
        and type(p) in ORDINARY
        and value.shape == p.shape
        and value.is_floating_point()
        and value.layout == torch.strided
        and not (value.is_meta or p.is_complex())
    )


def check_tensor(index: Any, p: Tensor, name: str, value: Tensor) -> None:
    """Raise RuntimeError where a tensor has no numbers of its own to load."""
    if type(value) is Tensor and value.layout == torch.strided and not value.is_meta:  # as most are
        return
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
    fits = type(number) is float or isinstance(number, Real)
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


def check_complete(optimizer: Update, group: dict[str, Any], index: Any, p: Tensor, there: Sequence[str]) -> None:
    """Raise ValueError where a state that has been started lacks what the group's variant keeps."""
    variant = optimizer.variant(group)
    needed = {*variant.state_names}
    if variant.prologue and optimizer.prologue_names:
        needed |= optimizer.prologue_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group).keys()
    if needed & {*there} or (optimizer.counts_steps and "step" in there):
        needed |= {"step"} if optimizer.counts_steps else set()
        needed |= optimizer.first_scalar_states(group).keys() - {COUNT}
    else:
        needed = set()
    for one, other in ((AVERAGE, COUNT), (COUNT, AVERAGE), ("residual_low", "residual")):
        needed |= {other} if one in there else set()
    if missing := sorted(needed.difference(there)):
        raise ValueError(
            f"the state of parameter {index} holds {sorted(there)} and lacks {missing}: {type(optimizer).__name__} "
            f"can't go on from it. {AGAIN}"
        )


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
        dtypes = {name: scalar_state_dtype(group, name) for name in optimizer.scalar_state_names(group)}
        for p in group["params"] if dtypes else ():
            state = optimizer.state.get(p, {})
            for name, dtype in dtypes.items():
                if name in state and not isinstance(state[name], Tensor):
                    state[name] = own_number(optimizer, group, p, name, state[name], dtype)
