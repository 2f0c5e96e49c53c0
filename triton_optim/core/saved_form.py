"""How states are saved: as they are held, but for numbers that share memory, and for codes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..precision.codecs import CODES_VERSION, SCALE, codes, in_blocks, new_parts, part_names, read
from ..precision.kept import check_state, current_codec
from ..spec import AVERAGE, COUNT, WEIGHTS, Update
from ..util.layout import ORDINARY, is_flattened, is_sharded, local, with_local

# What is saved of a quantized state, under its name: no other reader takes a dict for a tensor, whatever its shape.
CODES = ("codes", SCALE, "bits", "signed", "block", "version")

BYTES = ("residual", "residual_low")  # states of int8 that are no codes
# An average that is in the place of its weights is saved with them, in a dict: who knows only of averages, such as a
# distributed checkpoint that is loaded into what a new optimizer has, finds none, and says so.

# Of what kinds the values of a state are that is held as it is saved.
HELD = frozenset((*ORDINARY, int, float))

_BASE = attrgetter("_base")

AGAIN = "Load the state dict as it was saved."


def elementwise_names(optimizer: Update) -> list[str]:
    """The states of all variants that have an item for each element of the parameter."""
    return list(dict.fromkeys([*optimizer.declared, AVERAGE]))


class Names(NamedTuple):
    """What the states of an optimizer are called: found once, as thousands of parameters have them."""

    elementwise: list[str]
    scales: frozenset[str]  # of those
    counted: frozenset[str]  # numbers, those that the groups have
    numbers: frozenset[str]  # and those that others may have


def scales_of(elementwise: list[str]) -> frozenset[str]:
    """What the scales of these states are called, where they are quantized."""
    return frozenset([f"{name}_{SCALE}" for name in elementwise])


def names_of(optimizer: Update) -> Names:
    """What the states of any parameter may be called."""
    elementwise = elementwise_names(optimizer)
    counted = {"step", *chain.from_iterable(map(optimizer.scalar_state_names, optimizer.param_groups))}
    return Names(elementwise, scales_of(elementwise), frozenset(counted), frozenset(counted | {COUNT}))


def saved_states(optimizer: Update, states: Mapping[Any, Any], decoded: bool = False) -> list[Any]:
    """States as they are saved, in their order: with numbers that share memory with no other's, and codes that say how
    they are read.

    Loaded into torch.optim, numbers that share memory would each be counted once for every one of them; and who pickles
    one pickles all the memory that it is in.

    Args:
        states: by parameter, or by what else there may be states of.
        decoded: whether values stand in place of codes.
    """
    elementwise = elementwise_names(optimizer)
    scales = scales_of(elementwise)
    try:
        saved: list[Any] = list(map(dict.copy, states.values()))
    except TypeError:  # somebody put there what is no dict
        saved = [dict.copy(state) if isinstance(state, dict) else state for state in states.values()]
    dicts = saved if set(map(type, saved)) == {dict} else [state for state in saved if type(state) is dict]
    there: set[str] = set().union(*dicts)
    for name in there.difference(elementwise):
        values = [state.get(name) for state in dicts]
        if set(map(type, values)) == {Tensor} and set(map(_BASE, values)) == {None}:
            continue  # none is a part of another, as numbers on a CPU are none
        having = [state for state, v in zip(dicts, values, strict=True) if isinstance(v, Tensor) and not v.dim()]
        for state, value in zip(having, clones([state[name] for state in having]), strict=True):
            state[name] = value
    if not scales.isdisjoint(there):
        for p, state in zip(states, saved, strict=True):
            if isinstance(p, Tensor) and isinstance(state, dict) and not scales.isdisjoint(state):
                describe_codes(optimizer, elementwise, state, p, decoded)
    for state in dicts if WEIGHTS in there else ():
        if WEIGHTS in state:
            state[AVERAGE] = {name: state.pop(name) for name in (AVERAGE, WEIGHTS)}
    for i, (p, state) in enumerate(zip(states, saved, strict=True)) if decoded else ():
        if isinstance(state, dict) and is_flattened(p):
            hand_out_in_one_dtype(state)
        elif isinstance(state, dict) and isinstance(p, Tensor) and is_sharded(p):
            saved[i] = dict(sorted(state.items()))  # the ranks, which gather them in this order, may have made others
    return saved


def hand_out_in_one_dtype(state: dict[str, Any]) -> None:
    """Give residuals the dtype of the other states, in which they are exact: FullyShardedDataParallel gathers those of
    one dtype only.
    """
    dtypes = {v.dtype for v in state.values() if isinstance(v, Tensor) and v.dim() and v.is_floating_point()}
    for name in BYTES if len(dtypes) == 1 else ():
        if name in state:
            state[name] = state[name].to(*dtypes)


def describe_codes(optimizer: Update, names: list[str], state: dict[str, Any], p: Tensor, decoded: bool) -> None:
    """Replace codes and scales of the states of these names by what is saved of quantized states."""
    for name in names:
        if f"{name}_{SCALE}" not in state or (codec := current_codec(optimizer, state, name)) is None:
            continue
        scale = state.pop(f"{name}_{SCALE}")
        if codec.block_size and decoded:
            value = read(codec, [state[name], scale], local(p))
            state[name] = with_local(p, value.to(torch.promote_types(p.dtype, torch.float32)))
        elif codec.block_size:  # else a value was put in place of codes, and their scales are left over
            bits, signed = 8 // codec.elements_per_item[0], int(not optimizer.is_nonnegative(name))
            kept = (state[name], scale, bits, signed, codec.block_size, CODES_VERSION)
            state[name] = dict(zip(CODES, kept, strict=True))


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each."""
    if set(map(type, tensors)) == {Tensor} and hasattr(torch, "_foreach_clone"):  # torch 2.9 has none
        return list(torch._foreach_clone(tensors))
    return [t.clone() for t in tensors]


def loaded_state(optimizer: Update, index: Any, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as it is held, from how it was saved.

    Raises:
        RuntimeError: its codes are not those of so many elements, or of a version that is not known, or hold what the
            optimizer says they never do.
    """
    if is_flattened(p):  # see hand_out_in_one_dtype
        state = {name: v.to(torch.int8) if name in BYTES and isinstance(v, Tensor) else v for name, v in state.items()}
    if HELD.issuperset(map(type, state.values())):  # as most are: nothing is quantized
        return dict(state)
    names = elementwise_names(optimizer)
    held: dict[str, Any] = {}
    for name, value in state.items():
        if name == AVERAGE and isinstance(value, dict) and value.keys() == {AVERAGE, WEIGHTS}:
            held |= value
        elif isinstance(value, dict) and name in names:
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
    own = current_codec(optimizer, parts, name)
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
            f"{where} was saved with signs and holds negative numbers; {type(optimizer).__name__} declares it with "
            "nonnegative=True. Declare it without, or load a state dict of this optimizer."
        )
    return dict(zip((name, *part_names(own, name)), new_parts(own, value), strict=True))
