"""What a plan is made from: each parameter is checked, and sorted into a bucket."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends import bucket_class
from ..buckets.key import Key
from ..buckets.slots import ParamSlot
from ..dispatch import Backend, Choice, Layout, Request, choose, this_machine
from ..precision.codecs import Codec, parameter_codec, part_names, state_codec
from ..precision.kept import check_residuals, check_state, current_codec, current_parameter_codec
from ..spec import Update, offloads, states_device
from ..util.layout import (
    all_aligned,
    has_memory,
    is_sharded,
    is_wrapper,
    layout,
    local,
    made_in_inference_mode,
    overlapping,
)
from .prologue import check_states

# Elements whose updates a prologue may hold at a time. A step of more parameters is taken in pieces: in one, it would
# need as much memory again as all the gradients.
PIECE = 1 << 27


class Entry(NamedTuple):
    """What decides the bucket of a parameter."""

    number: int  # of the parameter among the optimizer's
    group: int
    p: Tensor
    gradient: torch.dtype
    codecs: tuple[Codec, ...]  # of the parameter and the states
    g_aligned: bool
    parts: Sequence[Tensor]  # tensors of the parameter and the states that exist and are kept
    overlaps: bool
    sparse: bool
    wrapped: bool  # the gradient or a state is a wrapper


def request_for(
    optimizer: Update, group: dict[str, Any], p: Tensor, known: Layout | None = None, sparse: bool = False
) -> Request:
    """What the dispatcher is asked for parameter `p` of `group`.

    Args:
        known: how the elements lie, if it is known; else it is computed from the parameter.
    """
    return Request(
        device=states_device(group, p).type,
        dtype=p.dtype,
        layout=known or layout(local(p)),
        differentiable=bool(group.get("differentiable")),
        sparse=sparse or not optimizer.takes_dense_gradients,
        pinned=None if optimizer.backend == "auto" else cast(Backend, optimizer.backend),
        fused=group.get("fused"),
        foreach=group.get("foreach"),
    )


def key_for(optimizer: Update, entry: Entry) -> Key:
    """The bucket of a parameter."""
    group = optimizer.param_groups[entry.group]
    known: Layout | None = "overlapping" if entry.overlaps else "wrapper" if entry.wrapped else None
    choice = choose(request_for(optimizer, group, entry.p, known, entry.sparse), this_machine())
    if not local(entry.p).numel():
        choice = Choice("eager", "no elements here: the step is only counted")
    elif offloads(group):
        choice = choice._replace(reason=f'offload="cpu" of parameters on {entry.p.device}: {choice.reason}')
    key = Key(
        choice,
        states_device(group, entry.p),
        optimizer.running_variant(group),
        entry.gradient,
        entry.codecs,
        aligned=False,
        capturable=bool(group.get("capturable")),
        differentiable=bool(group.get("differentiable")),
        sparse=entry.sparse,
        home=entry.p.device if offloads(group) else None,
    )
    if not bucket_class(key).launches_kernels:
        return key
    aligned = entry.g_aligned and all_aligned(t.data_ptr() for t in entry.parts)
    # A skipped step is not counted: where only the device knows of it, the device counts.
    return key._replace(aligned=aligned, capturable=key.capturable or optimizer.amp is not None)


def check_gradient(optimizer: Update, group: dict[str, Any], index: int, p: Tensor, local_g: Tensor) -> None:
    """Raise what torch raises for a (local) gradient that cannot be used."""
    name = type(optimizer).__name__
    if local_g.layout != torch.strided:
        why = optimizer.sparse_gradients(group) if local_g.is_sparse else "only torch.sparse_coo ones can be run"
        if why != "rows":
            raise RuntimeError(
                f"{name} does not support sparse gradients here: {why}; the gradient of parameter {index} is "
                f"{local_g.layout}. Build the embedding with sparse=False, or call grad.to_dense() before the step."
            )
    elif not optimizer.takes_dense_gradients:
        raise RuntimeError(
            f"{name} does not support dense gradients, which that of parameter {index} is. Build the embedding with "
            "sparse=True, or give it to another optimizer."
        )
    if is_sharded(local_g):
        raise RuntimeError(
            f"{name}: the gradient of parameter {index} is a DTensor, the parameter an ordinary tensor. "
            "Assign a gradient of the parameter's own kind."
        )
    check_memory(optimizer, index, "its gradient", local_g, written=False)
    local_p = local(p)
    for what in ("shape", "device"):
        ours, theirs = getattr(local_g, what), getattr(local_p, what)
        if ours != theirs:
            raise RuntimeError(
                f"{name}: the gradient of parameter {index} has {what} {ours}, the parameter {theirs}. "
                "Clear the gradients after moving or reshaping parameters (zero_grad())."
            )
    if local_p.is_meta and group.get("fused"):
        # Elsewhere another backend steps in; but a step of tensors without memory is a forgotten to_empty().
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported devices; parameter "
            f"{index} is {p.dtype} on meta. Give the model memory first (to_empty())."
        )
    if local_g.is_complex() != local_p.is_complex():
        raise RuntimeError(
            f"{name}: the gradient of parameter {index} is {local_g.dtype}, the parameter {local_p.dtype}. "
            "Give both real, or both complex."
        )


def check_memory(optimizer: Update, index: int, what: str, tensor: Tensor, written: bool = True) -> None:
    """Raise RuntimeError where an ordinary (local) tensor has no memory, or none that may be written now."""
    if written and made_in_inference_mode(tensor) and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{type(optimizer).__name__}: parameter {index}, or {what}, was made in inference mode, outside of which "
            "it can't be written. Make it anew (tensor.clone()), or step in inference mode."
        )
    plain = tensor.layout == torch.strided and tensor.device.type != "meta" and not is_wrapper(tensor)
    if plain and tensor.numel() and not has_memory(tensor):
        raise RuntimeError(
            f"{type(optimizer).__name__}: the memory of parameter {index}, or of {what}, was freed: its storage has "
            f"{tensor.untyped_storage().nbytes()} bytes for {tensor.numel():,} elements of {tensor.dtype}. "
            "Give it back before the step."
        )


def check_place(optimizer: Update, index: int, p: Tensor, name: str, state: Tensor) -> None:
    """Raise RuntimeError for a state that the step of its parameter can't write, nor bring to where it can."""
    if state.is_meta != p.is_meta:
        raise RuntimeError(
            f"{name} of parameter {index} is on {state.device}, the parameter on {p.device}. Move the state back "
            "before the step."
        )
    if is_wrapper(local(state)) and not is_wrapper(local(p)):
        raise RuntimeError(
            f"{name} of parameter {index} is a {type(local(state)).__name__}, the parameter an ordinary tensor: a "
            "rule's state must be one, too. Dequantize it (state.dequantize()), or clear opt.state."
        )
    check_memory(optimizer, index, name, local(state))


def check_offloaded(optimizer: Update, index: int, p: Tensor, g: Tensor | None, overlaps: bool) -> None:
    """Raise RuntimeError where a parameter can't be stepped in host memory."""
    why = None
    if overlaps:
        why = f"parameter {index} shares memory with another, and they would be written one over the other"
    elif is_wrapper(local(p)):
        why = f"parameter {index} is a {type(local(p)).__name__}, whose elements only its own operations reach"
    elif (g is not None and g.layout != torch.strided) or not optimizer.takes_dense_gradients:
        why = f"the gradient of parameter {index} is sparse"
    if why:
        raise RuntimeError(f'{type(optimizer).__name__}: offload="cpu": {why}. Give it a group with offload=None.')


def entries_of(
    optimizer: Update,
    params: list[Tensor],
    gradients: Gradients,
    known: dict[int, Key] | None = None,
    every: bool = False,
    only: int | None = None,
    repeats: bool = False,
) -> list[Entry]:
    """The parameters that belong to a plan: those with a gradient or a state, or all of them. Changes nothing.

    One without a gradient is taken to have the dtype and alignment that are known, else its own.

    Args:
        known: the buckets that parameters had so far, by their indices.
        every: all parameters, whether there is a gradient or not.
        only: the index of the only parameter that is asked about, which overlaps no other.
        repeats: whether a parameter is there twice: then only those with a gradient belong to a plan.
    """
    ends = list(accumulate(len(group["params"]) for group in optimizer.param_groups))
    variants = [optimizer.running_variant(group) for group in optimizer.param_groups]
    counted = [optimizer.scalar_state_names(group) for group in optimizer.param_groups]
    overlaps = overlapping([local(p) for p in params]) if only is None else set()
    known = known or {}
    entries = []
    for index in range(len(params)) if only is None else [only]:
        p, g, group = params[index], gradients[index], bisect_right(ends, index)
        own = optimizer.param_groups[group]
        if is_lazy(p):  # it gets its shape in the first forward
            continue
        state = optimizer.state.get(p, {})
        variant = variants[group]
        if variant.prologue and p.is_complex() and g is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} does not support complex parameters; parameter {index} is {p.dtype}. "
                "Give it to another optimizer."
            )
        names = variant.state_names
        lacking = any(state.get(name) is None for name in (*names, *counted[group]))
        if variant.staged and g is None and not lacking:
            like = torch.empty(p.shape, dtype=p.dtype, device="meta")
            lacking = not optimizer.first_kept(like, own).keys() <= state.keys()
        if g is None and not every and (repeats or lacking):
            continue
        if variant.staged:
            check_states(optimizer, own, index, p, state)
        for name in optimizer.coded_names if variant.prologue else ():
            if state.get(name) is not None:
                check_state(optimizer, index, p, name, state)
        if offloads(own):
            check_offloaded(optimizer, index, p, g, index in overlaps)
        if any(size > 1 and stride == 0 for size, stride in zip(local(p).shape, local(p).stride(), strict=True)):
            raise RuntimeError(
                f"{type(optimizer).__name__}: parameter {index} of shape {tuple(p.shape)} is an expanded tensor, whose "
                "elements share memory and cannot be updated one by one. Make it a parameter of its own (p.clone())."
            )
        check_memory(optimizer, index, "its state", local(p))
        for name, value in state.items():
            if isinstance(value, Tensor) and name not in counted[group]:
                check_place(optimizer, index, p, name, value)
        for name in names:
            if state.get(name) is not None:
                check_state(optimizer, index, p, name, state)
        check_residuals(index, p, state)
        if g is not None:
            check_gradient(optimizer, own, index, p, g)
            sparse = g.is_sparse
            dtype, aligned = g.dtype, sparse or g.data_ptr() % 16 == 0
        elif index in known:
            key = known[index]
            dtype, aligned, sparse = key.gradient, key.aligned or not bucket_class(key).launches_kernels, key.sparse
        else:
            dtype, aligned, sparse = p.dtype, True, not optimizer.takes_dense_gradients
        current = [current_parameter_codec(state, p), *(current_codec(optimizer, state, name) for name in names)]
        target = [parameter_codec(own, p.dtype)]
        target += [state_codec(optimizer, own, n, p, h) for n, h in zip(names, current[1:], strict=True)]
        parts = [local(p)]
        for role, now, then in zip((None, *names), current, target, strict=True):
            if now is not None and now.dtypes == then.dtypes and now.elements_per_item == then.elements_per_item:
                parts += [local(state[part]) for part in ([] if role is None else [role]) + part_names(now, role)]
        if sparse and (kept := [codec.name for codec in target if codec.name != "plain"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}: the gradient of parameter {index} is sparse, and its rows are updated "
                f"where they were gathered, not kept as {kept[0]}. Use state_dtype=None, ema_dtype=None and "
                'param_precision="storage" for its group.'
            )
        wrapped = any(is_wrapper(t) for t in (*parts, g) if t is not None)
        entries.append(Entry(index, group, p, dtype, tuple(target), aligned, parts, index in overlaps, sparse, wrapped))
    shared = sharing_states(entries)
    return [e._replace(overlaps=True) if e.number in shared else e for e in entries] if shared else entries


def sharing_states(entries: list[Entry]) -> set[int]:
    """The indices of parameters whose states begin where another's do: they are updated one after the other."""
    of: dict[int, set[int]] = {}
    for entry in entries:
        for t in entry.parts[1:]:
            of.setdefault(t.data_ptr(), set()).add(entry.number)
    return set().union(*(sharing for at, sharing in of.items() if at and len(sharing) > 1))


# One for each parameter, by its index.
Gradients = Sequence[Tensor | None] | Mapping[int, Tensor | None]


def sort_params(optimizer: Update, entries: list[Entry]) -> dict[Key, list[ParamSlot]]:
    """The parameters by bucket. Those that share memory are updated in their order, in however many buckets."""
    slots: dict[Key, list[ParamSlot]] = {}
    averaged = cache(optimizer.averaged_so_far)
    elements, turn, last = 0, 0, None
    for entry in entries:
        slot = ParamSlot(optimizer, entry.number, entry.group, entry.p, averaged)
        key = key_for(optimizer, entry)
        if key.variant.prologue:
            elements += entry.p.numel()  # of a sharded one all: the pieces must be every rank's
            key = key._replace(piece=elements // PIECE)
        elif entry.overlaps:
            turn += last not in (None, key)
            last, key = key, key._replace(piece=turn)
        slots.setdefault(key, []).append(slot)
    return slots
