"""The exponential moving average of the weights: kept in the step's own launch, and swapped in for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .codecs import AVERAGE, COUNT, Codec, averages, held_parameter_codec, part_names, read
from .kernels.average import lerp
from .kernels.language import torch_form
from .layout import local, with_local

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer

average_of = torch_form(lerp)


def check_averaging(optimizer: RuleOptimizer, group: dict[str, Any]) -> None:
    """Raise ValueError where an option of a group is none that there is, RuntimeError where it can't be had."""
    if not averages(group):
        return
    decay, dtype = group["ema_decay"], group.get("ema_dtype")
    if not 0 <= decay < 1:
        raise ValueError(f"Invalid ema_decay: {decay}. It must be at least 0 and below 1, such as 0.999.")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"Invalid ema_dtype: {dtype!r}. Use None (float32, or the parameter's dtype where that is wider), "
            "torch.float32 or torch.bfloat16."
        )
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
    codec = held_parameter_codec(state, p)
    return read(codec, [local(p).detach(), *(local(state[name]) for name in part_names(codec, None))], local(p))


def count_so_far(optimizer: RuleOptimizer) -> float:
    """Of how many values the averages are, which a parameter that is new to them joins."""
    if optimizer._release is not None:  # some have been counted in this round already
        return optimizer._release.averaged
    return largest_count(optimizer)


def largest_count(optimizer: RuleOptimizer) -> float:
    """Of how many values the average is that has the most."""
    return max((float(state[COUNT]) for state in optimizer.state.values() if COUNT in state), default=0.0)


@contextmanager
def averaged_parameters(optimizer: RuleOptimizer) -> Iterator[None]:
    """See :meth:`RuleOptimizer.averaged_parameters`."""
    if optimizer._swapped:
        raise RuntimeError("averaged_parameters() is entered already: leave it first.")
    if not any(map(averages, optimizer.param_groups)):
        raise RuntimeError(f"{type(optimizer).__name__} keeps no averages. Give it ema_decay, such as ema_decay=0.999.")
    params = [p for group in optimizer.param_groups if averages(group) for p in group["params"]]
    # An average of no values is what the parameter was when the state was made.
    own = [(p, optimizer.state[p][AVERAGE]) for p in params if float(optimizer.state.get(p, {}).get(COUNT, 0))]
    kept = [local(p).detach().clone() for p, _ in own]
    optimizer._swapped = True
    try:
        with torch.no_grad():
            for p, average in own:
                local(p).copy_(local(average))
        yield
    finally:
        with torch.no_grad():
            for (p, _), before in zip(own, kept, strict=True):
                local(p).copy_(before)
        optimizer._swapped = False


def initial_average(state: dict[str, Any], p: Tensor, codec: Codec) -> Tensor:
    """The parameter as it is before the step."""
    value = value_of(state, p).to(codec.dtypes[0]) if codec.name == "plain" else value_of(state, p).float()
    return with_local(p, value.clone(memory_format=torch.preserve_format))
