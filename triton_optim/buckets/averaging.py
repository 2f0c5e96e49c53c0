"""The averages of parameters that have no gradient in a step. Those of the others are the step's own work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision.averaging import average_of, value_of, weight
from ..precision.codecs import read, write
from ..precision.random_bits import bits_of_parameter
from ..spec import AVERAGE, COUNT, Update
from ..util.hyperparameters import exact_number, plain_group
from ..util.layout import local
from .key import Key
from .slots import ParamSlot
from .step_groups import StepGroup


def average_what_stays(optimizer: Update, key: Key, step_group: StepGroup, skip: Tensor | None) -> None:
    """Count parameters that have no gradient in this step into their averages, too."""
    group = plain_group(optimizer.param_groups[step_group.group])
    count = step_group.numbers(on_device=key.capturable)[COUNT]
    share = weight(group, count)
    for m in step_group.slots:
        codec = key.codecs[-1]
        average = [local(m.state[AVERAGE])]
        before = read(codec, average, local(m.p)).to(key.compute)
        value = value_of(m.state, m.p).to(key.compute)
        bits = bits_of_average(m, group, count, average[0]) if codec.random else None
        new = average_of(before, value, exact_number(share))
        new = new if skip is None else torch.where(skip != 0, before, new)
        write(codec, average, new, len(key.codecs), bits)
    step_group.count_average(skip)


def bits_of_average(m: ParamSlot, group: dict[str, Any], count: Any, average: Tensor) -> Tensor:
    """The random bits of an average of what stays. Its step is not counted, so that they are of the average's own
    count, and of a role that no rule has.
    """
    return bits_of_parameter(m.p, m.index, int(group.get("seed", 0)), count, average)
