"""The part of a step before the rule, for optimizers whose scalars differ between parameters: sums over each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..buckets.bucket import Bucket
from ..buckets.key import Key
from ..buckets.slots import CPU
from ..buckets.step_scalars import StepScalars
from ..precision.codecs import read
from ..spec import Measured, Update
from ..util.hyperparameters import plain_group
from ..util.layout import added_up, is_sharded, samples, split_over


def run_measures(optimizer: Update, buckets: Sequence[Bucket]) -> bool:
    """Give every bucket that measures the scalars that the optimizer makes of the sums.

    Args:
        optimizer: whose ``kept_scalars``, ``measure``, ``total`` and ``factors`` are asked.
        buckets: which hold their gradients and rows.

    Returns:
        Whether states may have been written.
    """
    own = [bucket for bucket in buckets if bucket.key.variant.measures and any(bucket.rows)]
    if type(optimizer).kept_scalars is not Update.kept_scalars:
        fill_in(optimizer, own)
    sums = [sums_of(optimizer, bucket) if bucket.key.variant.sampled else bucket.measure() for bucket in own]
    sharded = any(bucket.sharded for bucket in own)
    if sharded:
        sums = over_shards(own, sums)
    turns = [
        (bucket, number, measured_of(optimizer, bucket, number, found))
        for bucket, found in zip(own, sums, strict=True)
        for number, row in enumerate(bucket.rows)
        if row is not None
    ]
    total = optimizer.total(in_order(turns) if sharded else [measured for *_, measured in turns])
    for bucket, number, measured in turns:
        factors = optimizer.factors(measured._replace(total=total))
        check_factors(optimizer, measured, factors)
        take_factors(bucket, number, {name: wide(values, measured.numel) for name, values in factors.items()})
    return bool(optimizer.kept_names)


def sums_of(optimizer: Update, bucket: Bucket) -> Tensor:
    """What the optimizer sums of every few elements, ``(slots, sums)``: in torch operations, a group at a time."""
    key, found = bucket.key, {}
    for number, row in enumerate(bucket.rows):
        if row is None:
            continue
        measured, positions = measured_of(optimizer, bucket, number), bucket.step_groups[number].positions
        every, slots = int(measured.group[str(key.variant.sampled)]), [bucket.slots[i] for i in positions]
        parts = [[m.p] if key.differentiable else bucket.parts_of(m)[0] for m in slots]
        values = [samples(own, every) for own in zip(*parts, strict=True)]
        gradients = samples([g for g in map(bucket.gradients.__getitem__, positions) if g is not None], every)
        params = read(key.codecs[0], values, values[0]).to(key.compute)
        sums = optimizer.sums(measured, params, gradients.to(key.compute) * row.factor)
        found[positions[0]] = torch.stack([x.to(measured.numel.dtype) for x in sums])
    nothing = torch.zeros_like(next(iter(found.values())))
    return torch.stack([found.get(i, nothing) for i in range(len(bucket.slots))])


def in_order(turns: Sequence[tuple[Bucket, int, Measured]]) -> list[Measured]:
    """What was found, the parameters of a group that were counted alike together and in their order, as every rank has
    it: buckets differ between ranks, and sums of other orders in their last bits.
    """
    alike: dict[Any, list[tuple[list[int], Measured]]] = {}
    for bucket, number, measured in turns:
        step_group = bucket.step_groups[number]
        alike.setdefault(step_group.counted, []).append(([m.index for m in step_group.slots], measured))
    found = []
    for own in alike.values():
        indices = [index for each, _ in own for index in each]
        order = sorted(range(len(indices)), key=indices.__getitem__)
        first = own[0][1]

        def joined(parts: Iterable[Tensor], order: list[int] = order, like: Tensor = first.numel) -> Tensor:
            return torch.cat([part.to(like.device) for part in parts])[order]

        params, states = ([x for _, m in own for x in getattr(m, name)] for name in ("params", "states"))
        every = first._replace(
            params=[params[i] for i in order],
            states=[states[i] for i in order],
            numel=joined(m.numel for _, m in own),
            sums=tuple(map(joined, zip(*(m.sums for _, m in own), strict=True))),
        )
        found.append((indices[order[0]], every))
    return [every for _, every in sorted(found, key=itemgetter(0))]


def fill_in(optimizer: Update, buckets: Sequence[Bucket]) -> None:
    """Fill in the scalars that the optimizer computes from its states."""
    for bucket in buckets:
        for number, row in enumerate(bucket.rows):
            if row is None:
                continue
            measured = measured_of(optimizer, bucket, number)
            found = optimizer.kept_scalars(measured)
            check_factors(optimizer, measured, found, "kept_scalars")
            bucket.rows[number] = filled_in(row, found, bucket.key)


def filled_in(row: StepScalars, values: dict[str, Any], key: Key) -> StepScalars:
    """The row with these scalars replaced, each by one number."""
    if key.device == CPU and not (key.differentiable or key.capturable):
        values = {name: float(value) for name, value in values.items()}
    else:  # a device is not asked
        values = {name: v.reshape(()) if isinstance(v, Tensor) else v for name, v in values.items()}
    return row._replace(h=row.h._replace(**values))


def take_factors(bucket: Bucket, number: int, factors: dict[str, Tensor]) -> None:
    """Keep the scalars that differ between the parameters of a step group: each ``(parameters,)``."""
    for name, values in factors.items():
        if len(bucket.step_groups) == 1:
            bucket.factors[name] = values
            continue
        into = bucket.factors.get(name)
        into = of_all(bucket, name, values) if into is None else into
        bucket.factors[name] = into.index_copy(0, bucket.positions_of(number), values)


def of_all(bucket: Bucket, name: str, like: Tensor) -> Tensor:
    """A scalar for every parameter, from the rows."""
    into = like.new_zeros(len(bucket.slots))
    for number, row in enumerate(bucket.rows):
        if row is not None:
            into = into.index_fill(0, bucket.positions_of(number), getattr(row.h, name))
    return into


def wide(values: Any, like: Tensor) -> Tensor:
    """A scalar of each parameter; a number is filled in where it is needed, as nothing may wait for a copy."""
    filled = values.to(like) if isinstance(values, Tensor) else like.new_full((), values)
    return filled.expand(len(like))


def measured_of(optimizer: Update, bucket: Bucket, number: int, sums: Tensor | None = None) -> Measured:
    """What was found of the parameters of a bucket's step group.

    Args:
        number: of the step group.
        sums: of :meth:`Bucket.measure`; None before that.
    """
    row, step_group = bucket.rows[number], bucket.step_groups[number]
    assert row is not None
    numel = bucket.whole_numels
    if len(bucket.step_groups) > 1:
        positions = bucket.positions_of(number)
        sums, numel = None if sums is None else sums[positions], numel[positions]
    group = plain_group(optimizer.param_groups[step_group.group], keep=bucket.key.differentiable)
    params, states = [m.p for m in step_group.slots], [m.state for m in step_group.slots]
    return Measured(group, row.h, params, states, numel, () if sums is None else sums.unbind(1))


def check_factors(optimizer: Update, measured: Measured, factors: Any, method: str = "factors") -> None:
    """Raise TypeError unless a method returned scalars of the rule: one for each parameter if it is ``factors``, else
    one for all.
    """
    name, fields = f"{type(optimizer).__name__}.{method}", measured.h._fields
    if not isinstance(factors, dict) or not factors.keys() <= set(fields):
        got = sorted(factors) if isinstance(factors, dict) else repr(factors)
        raise TypeError(
            f"{name} returned {got}; return a dict whose keys are scalars of the rule: {', '.join(fields)}."
        )
    count = len(measured.params)
    takes = (count,) if method == "factors" else ()
    what = "a number a parameter" if takes else "a number"
    for field, values in factors.items():
        if not isinstance(values, (int, float, Tensor)):
            raise TypeError(f"{name} returned {field}={values!r}; return a tensor or a number.")
        shape = tuple(getattr(values, "shape", ()))
        if shape not in ((), (1,), takes):
            raise TypeError(f"{name} returned {field} of shape {shape} for {count} parameters; return {takes}, {what}.")


def over_shards(buckets: Sequence[Bucket], sums: Sequence[Tensor]) -> list[Tensor]:
    """The sums over whole parameters, of which each rank has a part; the same on every rank.

    The parameters are taken in their order: each rank must ask alike, and buckets differ between ranks.
    """
    every: list[tuple[int, Any, int, int]] = []  # a parameter: its number, itself, its bucket, its position there
    for b, bucket in enumerate(buckets):
        every += [(m.index, m.p, b, i) for i, m in enumerate(bucket.slots) if is_sharded(m.p)]
    alike: dict[Any, list[tuple[int, int]]] = {}
    for _, p, b, i in sorted(every, key=lambda one: one[0]):
        alike.setdefault((p.device_mesh, *split_over(p)), []).append((b, i))
    new = [found.clone() for found in sums]
    for (mesh, *dims), positions in alike.items():
        whole = added_up(torch.stack([sums[b][i] for b, i in positions]), mesh, dims)
        for (b, i), row in zip(positions, whole.unbind(), strict=True):
            new[b][i] = row
    return new
