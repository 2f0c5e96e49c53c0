"""The part of a step before the rule, for optimizers whose update of an element needs more than its own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..buckets.bucket import Bucket
from ..buckets.slots import ParamSlot
from ..buckets.step_scalars import StepScalars, step_scalars_for
from ..precision.codecs import Codec, part_names, read, state_codec, write
from ..precision.random_bits import bits_of_parameter
from ..spec import Update
from ..util.hyperparameters import plain_group
from ..util.layout import is_sharded, local, mesh_of, with_local


def check_states(optimizer: Update, group: dict[str, Any], index: int, p: Tensor, state: dict[str, Any]) -> None:
    """Raise RuntimeError where a state of the prologue has another shape than the optimizer would make it."""
    like = optimizer.first_kept(torch.empty(p.shape, dtype=p.dtype, device="meta"), group)
    for name in optimizer.kept_names:
        if name in optimizer.coded_names:  # which have a check of their own
            continue
        value = state.get(name)
        shape = like[name].shape if name in like else p.shape
        if isinstance(value, Tensor) and value.shape != shape:
            wanted = f"it is {tuple(shape)}" if name in like else "there is none"
            raise RuntimeError(
                f"{name} of parameter {index} has shape {tuple(value.shape)}; for the parameter's shape "
                f"{tuple(p.shape)}, with the options of its group, {wanted}. Load a state dict of the same parameters "
                "in the same order, give the group the options that the state was made with, or clear opt.state."
            )


def run_prologues(optimizer: Update, buckets: Sequence[Bucket]) -> None:
    """Replace the gradients by what the optimizer's prologue makes of them, in every bucket that has one.

    A call gets all parameters of a group that were counted alike and are sharded over one mesh, or over none, in the
    order of the parameters, whatever their buckets: where they are sharded it communicates, and buckets differ between
    ranks.

    Args:
        optimizer: whose prologue it is.
        buckets: which hold their gradients and rows. The factor of the rows becomes 1: the prologue has seen negated
            gradients where the group maximizes.
    """
    turns: dict[tuple[object, ...], list[tuple[int, Bucket, int, StepScalars]]] = {}
    for bucket in buckets:
        if bucket.key.variant.prologue:
            for step_group, row in zip(bucket.step_groups, bucket.rows, strict=True):
                if row is not None:
                    for i in step_group.positions:
                        m = bucket.slots[i]
                        turns.setdefault((step_group.counted, mesh_of(m.p)), []).append((m.index, bucket, i, row))
    for turn in turns.values():
        turn.sort(key=itemgetter(0))
    for turn in sorted(turns.values(), key=lambda turn: turn[0][0]):
        run_prologue(optimizer, turn)
    for bucket in buckets:
        if bucket.key.variant.prologue:
            bucket.accept(bucket.gradients)
            bucket.rows = [row and row._replace(factor=1.0) for row in bucket.rows]


def warm_prologue(optimizer: Update, slots: list[ParamSlot]) -> None:
    """Run the prologue on zeros, of each shape once, so that all is compiled that it will need."""
    kinds = {(m.group, m.p.shape, m.p.dtype): m for m in slots if not is_sharded(m.p)}
    for m in kinds.values():
        group = optimizer.param_groups[m.group]
        p = m.p.detach()
        state = optimizer.first_kept(p, group) | {name: torch.zeros_like(p) for name in optimizer.declared}
        optimizer.prologue(
            plain_group(group), step_scalars_for(optimizer, group, 1).h, [p], [torch.zeros_like(p)], [state]
        )


def run_prologue(optimizer: Update, turn: list[tuple[int, Bucket, int, StepScalars]]) -> None:
    """One call: of parameters by index, bucket, position in it, and scalars."""
    slots = [bucket.slots[i] for _, bucket, i, _ in turn]
    _, first, _, row = turn[0]
    kept = first.key.differentiable
    gradients: list[Tensor] = []
    for (_, bucket, i, _), m in zip(turn, slots, strict=True):
        g = bucket.gradients[i]
        assert g is not None
        gradients.append(with_local(m.p, row.factor * g if isinstance(row.factor, Tensor) or row.factor != 1 else g))
    group = optimizer.param_groups[slots[0].group]
    coded = coded_of(optimizer, group, slots)
    states = [m.state for m in slots]
    for i, own in coded.items():
        states[i] = {**states[i], **{c.name: c.value for c in own}}
    updates = optimizer.prologue(
        plain_group(group, keep=kept),
        row.h,
        # Autograd may keep what it is shown, and the rule will write the parameter.
        [m.p.clone() if kept else m.p.detach() for m in slots],
        gradients,
        states,
    )
    for i, own in coded.items():
        for c in own:
            c.keep(slots[i], group, row.step)
    check_updates(optimizer, updates, gradients)
    for (_, bucket, i, _), update in zip(turn, updates, strict=True):
        bucket.take_update(i, update)


def check_updates(optimizer: Update, updates: Any, gradients: list[Tensor]) -> None:
    """Raise TypeError unless a prologue returned a tensor like each gradient: compiled code reads as much of it."""
    found = list(updates) if isinstance(updates, (list, tuple)) else [updates]
    wrong = f"{len(found)} of them" if len(found) != len(gradients) else ""
    for update, g in zip(found, gradients, strict=False):
        if not isinstance(update, Tensor):
            wrong = wrong or f"a {type(update).__name__}"
        elif (local(update).shape, update.device, update.layout) != (local(g).shape, g.device, torch.strided):
            wrong = wrong or f"one of shape {tuple(update.shape)}, {update.layout} on {update.device}"
        elif update.is_complex():
            wrong = wrong or f"one of {update.dtype}"
    if wrong:
        shapes = ", ".join(str(tuple(g.shape)) for g in gradients[:4]) + ", ..." * (len(gradients) > 4)
        raise TypeError(
            f"{type(optimizer).__name__}.prologue returned {wrong}. Return a list of what takes the gradients' place: "
            f"one real tensor for each, of its shape ({shapes}), on {gradients[0].device}."
        )


class Coded(NamedTuple):
    """A state that a prologue gets in float32.

    Attributes:
        name: of the state.
        codec, parts: how it is kept, on this process.
        value: in float32, as the parameter is placed.
        role: by which its random bits differ from those of others.
    """

    name: str
    codec: Codec
    parts: list[Tensor]
    value: Tensor
    role: int

    def keep(self, m: ParamSlot, group: dict[str, Any], step: Any) -> None:
        """Keep what the prologue made of it."""
        bits = None
        if self.codec.random:
            bits = bits_of_parameter(m.p, m.index, int(group.get("seed", 0)), step, local(m.p))
        write(self.codec, self.parts, local(self.value), self.role, bits)


def coded_of(optimizer: Update, group: dict[str, Any], slots: list[ParamSlot]) -> dict[int, list[Coded]]:
    """The states that are not kept as they are, by the position of their parameter."""
    if not optimizer.coded_names or group.get("state_dtype") in (None, torch.float32):
        return {}
    found: dict[int, list[Coded]] = {}
    for i, m in enumerate(slots):
        for role, name in enumerate(optimizer.coded_names, len(optimizer.declared) + 1):
            codec = state_codec(optimizer, group, name, m.p)
            if codec.name == "plain":
                continue
            parts = [local(m.state[part]) for part in (name, *part_names(codec, name))]
            value = with_local(m.p, read(codec, parts, local(m.p)))
            found.setdefault(i, []).append(Coded(name, codec, parts, value, role))
    return found
