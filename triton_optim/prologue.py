"""The part of a step before the rule, for optimizers whose update of an element needs more than its own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bucket import Bucket, Row, plain_group
from .layout import with_local

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer


def check_states(optimizer: RuleOptimizer, group: dict[str, Any], index: int, p: Tensor, state: dict[str, Any]) -> None:
    """Raise RuntimeError where a state of the prologue has another shape than the optimizer would make it."""
    like = optimizer.prologue_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group)
    for name in optimizer.prologue_names:
        value = state.get(name)
        shape = like[name].shape if name in like else p.shape
        if isinstance(value, Tensor) and value.shape != shape:
            raise RuntimeError(
                f"{name} of parameter {index} has shape {tuple(value.shape)}; for the parameter's shape "
                f"{tuple(p.shape)} it is {tuple(shape)}. Load a state dict of the same parameters in the same "
                "order, or clear opt.state."
            )


def run_prologues(
    optimizer: RuleOptimizer, buckets: Sequence[Bucket], rows: list[list[Row | None]]
) -> list[list[Row | None]]:
    """Put what the optimizer's prologue makes of the gradients in their place, in every bucket that has one.

    A call gets all parameters of a group that were counted alike, in the order of the parameters, whatever their
    buckets: where they are sharded it communicates, and buckets differ between ranks.

    Returns:
        The rows; the prologue has seen negated gradients where the group maximizes, so the rule's are as they are.
    """
    if not any(bucket.key.variant.prologue for bucket in buckets):
        return rows
    turns: dict[tuple[object, ...], list[tuple[Bucket, int, Row]]] = {}
    for bucket, own in zip(buckets, rows, strict=True):
        if bucket.key.variant.prologue:
            for cohort, row in zip(bucket.cohorts, own, strict=True):
                if row is not None:
                    turns.setdefault(cohort.counted, []).extend((bucket, place, row) for place in cohort.places)
    ordered = [sorted(turn, key=lambda entry: entry[0].members[entry[1]].index) for turn in turns.values()]
    for turn in sorted(ordered, key=lambda turn: turn[0][0].members[turn[0][1]].index):
        members = [bucket.members[place] for bucket, place, _ in turn]
        first, _, row = turn[0]
        kept = first.key.differentiable
        gradients: list[Tensor] = []
        for (bucket, place, _), m in zip(turn, members, strict=True):
            g = bucket.gradients[place]
            assert g is not None
            gradients.append(with_local(m.p, row.factor * g if row.factor != 1 else g))
        updates = optimizer.prologue(
            plain_group(optimizer.param_groups[members[0].group], keep=kept),
            row.h,
            # Autograd may keep what it is shown, and the rule will write the parameter.
            [m.p.clone() if kept else m.p.detach() for m in members],
            gradients,
            [m.state for m in members],
        )
        for (bucket, place, _), update in zip(turn, updates, strict=True):
            bucket.take_update(place, update)
    plain: list[list[Row | None]] = []
    for bucket, own in zip(buckets, rows, strict=True):
        if bucket.key.variant.prologue:
            bucket.accept(bucket.gradients)
            own = [row and row._replace(factor=1.0) for row in own]
        plain.append(own)
    return plain
