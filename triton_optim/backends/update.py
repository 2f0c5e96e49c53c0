"""A step in torch operations, which the eager backend runs and the compiled one compiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buckets.bucket import Bucket
from ..buckets.gradient_norm import exact_dtype
from ..buckets.key import Key
from ..buckets.step_scalars import StepScalars
from ..kernels.language import python_function, results, torch_form
from ..precision.averaging import average_of
from ..precision.codecs import read, write
from ..precision.random_bits import bits_of_elements
from ..util.hyperparameters import exact_number
from ..util.layout import numbers_in_memory


def measure(bucket: Bucket) -> Tensor:
    """See :meth:`Bucket.measure`: in torch operations, a parameter at a time."""
    key, wide, found = bucket.key, exact_dtype(bucket.key.device), []
    count: int = python_function(key.variant.measure).returned
    for m, g, number in zip(bucket.slots, bucket.gradients, bucket.group_of, strict=True):
        row = bucket.rows[number]
        if g is None or row is None:
            found.append(torch.zeros(count, dtype=wide, device=key.device))
            continue
        param, *states = bucket.parts_of(m)
        if key.differentiable:
            param[0] = m.p
        values = values_of(key, param, g, states, row)
        taken = values[: len(values) - key.variant.averaged]
        summed = torch_form(key.variant.measure)(*taken, row.h)
        found.append(torch.stack([t.sum(dtype=wide) for t in summed]))
    return torch.stack(found)


def values_of(key: Key, param: list[Tensor], g: Tensor, states: list[list[Tensor]], row: StepScalars) -> list[Tensor]:
    """What a rule is given: the values of p, g and the states, and at last the average, where there is one."""
    kept = [param, *states]
    if param[0].is_complex():
        kept, g = [[torch.view_as_real(t) for t in parts] for parts in kept], torch.view_as_real(g)
    values = [read(codec, parts, kept[0][0]) for codec, parts in zip(key.codecs, kept, strict=True)]
    values.insert(1, g)
    # A rule may hand its argument to autograd, which must not see it change afterwards.
    values = [(t.clone() if key.differentiable else t).to(key.compute) for t in values]
    if isinstance(row.factor, Tensor) or row.factor != 1:
        values[1] = values[1] * row.factor
    return values


def update(
    key: Key, param: list[Tensor], g: Tensor, states: list[list[Tensor]], row: StepScalars, random: Tensor | None = None
) -> None:
    """One parameter's step in torch operations, in place.

    Args:
        param, states: the parts that each is kept as.
        random: its row of random_bits.tensor_keys.
    """
    values = values_of(key, param, g, states, row)
    kept = [param, *states]
    if param[0].is_complex():
        kept = [[torch.view_as_real(t) for t in parts] for parts in kept]
    like = kept[0][0]
    average = values.pop() if key.variant.averaged else None
    bits = None if random is None else bits_of_elements(random, numbers_in_memory(like))
    new = results(torch_form(key.variant.rule), values, row.h)
    for role, (codec, parts, value) in enumerate(zip(key.codecs, kept, new, strict=average is None)):
        write(codec, parts, value, role, bits)
    if average is not None:
        value = read(key.codecs[0], kept[0], like).to(key.compute)
        write(
            key.codecs[-1],
            kept[-1],
            average_of(average, value, exact_number(row.weight)),
            len(new),
            bits,
        )
