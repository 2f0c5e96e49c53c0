"""The exponential moving average of the weights: kept in the step's own launch, and swapped in for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.average import lerp
from ..kernels.language import torch_form
from ..spec import COUNT, Update, averages
from ..util.hyperparameters import compared
from ..util.layout import local, with_local
from .codecs import Codec, part_names, read
from .kept import current_parameter_codec

average_of = torch_form(lerp)


def check_averaging(optimizer: Update, group: dict[str, Any]) -> None:
    """Raise ValueError where an option of a group is none that there is, RuntimeError where it can't be had."""
    dtype = group.get("ema_dtype")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"Invalid ema_dtype: {dtype!r}. Use None (float32, or the parameter's dtype where that is wider), "
            'torch.float32 or "float32", torch.bfloat16 or "bfloat16".'
        )
    if not averages(group):
        return
    decay = group["ema_decay"]
    if not compared("ema_decay", decay, lambda: 0 <= decay < 1):
        raise ValueError(f"Invalid ema_decay: {decay}. It must be at least 0 and below 1, such as 0.999.")
    if group.get("differentiable"):
        raise RuntimeError(
            f"{type(optimizer).__name__}: an average is no part of a differentiable step. Leave ema_decay or "
            "differentiable out."
        )


def weight(group: dict[str, Any], count: Any) -> Any:
    """What the parameter counts for in its average after `count` values: all for the first.

    Args:
        group: with plain numbers.
        count: a number, or a 0-dim float64 tensor.
    """
    decay = group["ema_decay"]
    if isinstance(count, Tensor):
        if group.get("ema_warmup"):
            decay = ((1 + count) / (10 + count)).clamp(max=decay)
        return 1 - decay * (count != 0).to(count.dtype)
    if group.get("ema_warmup"):
        decay = min(decay, (1 + count) / (10 + count))
    return 1.0 - decay if count else 1.0


def value_of(state: dict[str, Any], p: Tensor) -> Tensor:
    """A parameter with its corrections, on this process, in float32 where it has any."""
    codec = current_parameter_codec(state, p)
    return read(codec, [local(p).detach(), *(local(state[name]) for name in part_names(codec, None))], local(p))


def largest_count(optimizer: Update) -> float:
    """Of how many values the average is that has the most, of the parameters that the groups have."""
    states = (optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"])
    return max((float(state[COUNT]) for state in states if COUNT in state), default=0.0)


def initial_average(state: dict[str, Any], p: Tensor, codec: Codec) -> Tensor:
    """The parameter as it is before the step."""
    value = value_of(state, p).to(codec.dtypes[0]) if codec.name == "plain" else value_of(state, p).float()
    return with_local(p, value.clone(memory_format=torch.preserve_format))
