"""How existing states and parameters are kept: checks, and conversion from one codec into another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import Update
from ..util.layout import in_layout_of, local, with_local
from .codecs import (
    HALVES,
    RESIDUALS,
    SCALE,
    Codec,
    codes,
    in_blocks,
    new_parts,
    part_names,
    plain,
    read,
    restore_scales,
    with_residual,
)


def current_codec(optimizer: Update, state: dict[str, Any], name: str) -> Codec | None:
    """The codec of an existing state; None where there is none. Blocks of any size are known, and the dtype of the
    scales tells how many bits a code has.
    """
    value, scale = state.get(name), state.get(f"{name}_{SCALE}")
    if not isinstance(value, Tensor):
        return None
    # A value put in place of codes is no code.
    if not isinstance(scale, Tensor) or value.is_floating_point() or value.is_complex():
        return plain(value.dtype)
    code = codes("int8" if scale.dtype == torch.float32 else "int4", optimizer.is_nonnegative(name))
    return in_blocks(code, value.numel() * code.elements_per_item[0] // max(scale.numel(), 1))


def check_state(optimizer: Update, index: int, p: Tensor, name: str, state: dict[str, Any]) -> None:
    """Raise RuntimeError where an existing state does not belong to its parameter."""
    value = state[name]
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"{name} of parameter {index} is {value!r:.80}, no tensor. Load a state dict of the same parameters, or "
            "clear opt.state."
        )
    codec = current_codec(optimizer, state, name)
    if codec is not None and codec.block_size:
        scale = state[f"{name}_{SCALE}"]
        current = value.numel() * codec.elements_per_item[0]
        numel = local(p).numel()
        fits = (value.dtype, scale.dtype) == codec.dtypes and value.dim() == scale.dim() == 1
        whole = current == codec.block_size * scale.numel() and not codec.block_size % codec.elements_per_item[0]
        if not (fits and whole and 0 <= current - numel < codec.block_size):
            raise RuntimeError(
                f"{name} of parameter {index} has items of shape {tuple(value.shape)}, {value.dtype}, and scales of "
                f"shape {tuple(scale.shape)}, {scale.dtype}, which is not how {numel:,} elements are kept. Load a "
                "state dict of the same parameters, or clear opt.state."
            )
        return
    if value.is_complex() != p.is_complex() or not (value.is_floating_point() or value.is_complex()):
        raise RuntimeError(
            f"{name} of parameter {index} is {value.dtype}, the parameter {p.dtype}. A state is of floating-point "
            "numbers, complex ones of a complex parameter; codes need their scales beside them. Load a state dict of "
            "the same parameters, or clear opt.state."
        )
    check_shape(index, p, name, value)


def check_residuals(index: int, p: Tensor, state: dict[str, Any]) -> None:
    """Raise RuntimeError where what is kept beside a parameter does not belong to it."""
    codec = current_parameter_codec(state, p)
    for name, dtype in zip(part_names(codec, None), codec.dtypes[1:], strict=True):
        value = state.get(name)
        if not isinstance(value, Tensor) or value.dtype != dtype:
            found = value.dtype if isinstance(value, Tensor) else f"{value!r:.80}"
            raise RuntimeError(
                f"{name} of parameter {index} is {found}, and {dtype} beside a parameter of {p.dtype}. Load a state "
                "dict of the same parameters, or clear opt.state."
            )
        check_shape(index, p, name, value)


def check_shape(index: int, p: Tensor, name: str, value: Tensor) -> None:
    """Raise RuntimeError where a state is not of its parameter's shape, or placed otherwise."""
    placed = [getattr(t, "placements", None) for t in (p, value)]
    if value.shape != p.shape or placed[0] != placed[1] or local(value).shape != local(p).shape:
        theirs, ours = (
            f"{tuple(t.shape)}{'' if where is None else f', placed {where}'}"
            for t, where in zip((value, p), reversed(placed), strict=True)
        )
        alike = "" if placed == [None, None] else ", placed alike"
        raise RuntimeError(
            f"{name} of parameter {index} has shape {theirs}; the parameter {ours}. "
            f"Load a state dict of the same parameters{alike}, or clear opt.state."
        )


def current_parameter_codec(state: dict[str, Any], p: Tensor) -> Codec:
    """The codec of a parameter, which its corrections tell."""
    for name, precision in RESIDUALS.items():
        if name in state and p.dtype in HALVES:
            return with_residual(precision, p.dtype)
    return plain(p.dtype)


def convert_state(optimizer: Update, state: dict[str, Any], name: str, p: Tensor, target: Codec) -> None:
    """Convert a state from the codec that it has into `target`."""
    current = current_codec(optimizer, state, name)
    assert current is not None
    if current == target or (current.dtypes == target.dtypes and not current.block_size and not target.block_size):
        return
    names = [name, *part_names(current, name)]
    if current.block_size:
        value = read(current, [state[n] for n in names], local(p))
        value = with_local(p, value)
    else:
        value = state[name]
        if target.block_size:
            value = in_layout_of(local(p), local(value))
    for n in names:
        del state[n]
    parts = new_parts(target, value)
    if target.block_size:
        restore_scales(target, parts, local(value))
    state |= dict(zip([name, *part_names(target, name)], parts, strict=True))


def convert_parameter(state: dict[str, Any], p: Tensor, target: Codec) -> None:
    """Convert a parameter and its corrections from the codec that they have into `target`."""
    current = current_parameter_codec(state, p)
    if current.suffixes == target.suffixes:
        return
    names = part_names(current, None)
    own = p.detach()
    value = own.float()
    if names:
        parts = [local(own), *(local(state[n]).to(own.device) for n in names)]
        value = with_local(own, read(current, parts, local(own)))
    for n in names:
        del state[n]
    if target.suffixes:
        state |= dict(zip(part_names(target, None), new_parts(target, value, first=own)[1:], strict=True))
