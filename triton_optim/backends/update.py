"""A step in torch operations, which the eager backend runs and the compiled one compiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buckets.key import Key
from ..buckets.step_scalars import StepScalars
from ..kernels.language import results, torch_form
from ..precision.averaging import average_of
from ..precision.codecs import read, write
from ..precision.random_bits import bits_of_elements
from ..util.hyperparameters import exact_number
from ..util.layout import places


def update(
    key: Key, param: list[Tensor], g: Tensor, states: list[list[Tensor]], row: StepScalars, random: Tensor | None = None
) -> None:
    """One parameter's step in torch operations, in place.

    Args:
        param, states: the parts that each is kept as.
        random: its row of random_bits.tensor_keys.
    """
    kept = [param, *states]
    if param[0].is_complex():
        kept, g = [[torch.view_as_real(t) for t in parts] for parts in kept], torch.view_as_real(g)
    like = kept[0][0]
    values = [read(codec, parts, like) for codec, parts in zip(key.codecs, kept, strict=True)]
    values.insert(1, g)
    # A rule may hand its argument to autograd, which must not see it change afterwards.
    values = [(t.clone() if key.differentiable else t).to(key.compute) for t in values]
    if isinstance(row.factor, Tensor) or row.factor != 1:
        values[1] = values[1] * row.factor
    average = values.pop() if key.variant.averaged else None
    bits = None if random is None else bits_of_elements(random, places(like))
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
