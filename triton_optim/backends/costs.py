"""What a step of a bucket costs: how many kernels, compiled calls or torch operations, and the bytes that they move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..buckets.key import Key
from ..buckets.slots import ParamSlot
from ..buckets.step_scalars import first_scalars, step_scalars_for
from ..kernels.straight import roles_read
from ..spec import Measured, Update
from ..util.hyperparameters import plain_group
from ..util.layout import local, samples
from .update import update

MEASURE = {"triton": 2, "cpp": 1}  # calls; of others one a parameter


def cost(optimizer: Update, key: Key, slots: list[ParamSlot], step: int = 1) -> tuple[int, float]:
    """Kernels, compiled calls or torch operations that a step starts, and bytes that it reads and writes a parameter.

    A kernel is taken at its best: every role is read, and all but the gradient are written.
    """
    numels = [local(m.p).numel() for m in slots]
    operations, nbytes = prologue_traffic(optimizer, key, slots, step) if key.variant.prologue else (0, 0)
    before = nbytes / max(sum(numels), 1)
    if key.variant.measure is not None:
        roles = [key.codecs[0].nbytes_read, key.gradient.itemsize, *(codec.nbytes_read for codec in key.codecs[1:])]
        before += sum(roles[i] for i in roles_read(key.variant.measure))
        operations += MEASURE.get(key.choice.backend, sum(map(bool, numels)))
    if key.variant.sampled is not None:
        of_sums, nbytes = sums_traffic(optimizer, key, slots, step)
        operations, before = operations + of_sums, before + nbytes / max(sum(numels), 1)
    if key.choice.backend == "eager":
        each, moved = traffic(optimizer, key)
        if key.sparse:  # all but the gradient is gathered and scattered, that is read and written twice
            kept = [codec.dtypes[0].itemsize for codec in key.codecs]
            return operations + (each + 2 * len(kept)) * len(slots), before + moved + 4 * sum(kept)
        return operations + each * sum(map(bool, numels)), before + moved
    moved = sum(codec.nbytes + codec.nbytes_read for codec in key.codecs) + key.gradient.itemsize
    calls = 1
    if key.choice.backend == "compiled":
        from .compiled.bucket import calls_of

        calls = calls_of(numels, key.block_size)
    return operations + calls, before + moved


def traffic(optimizer: Update, key: Key) -> tuple[int, float]:
    """Operations a parameter, and bytes they read and write an element: counted on tensors without memory."""
    n = 1024
    kept = [[torch.empty(n // items, dtype=dtype, device="meta") for dtype, items in c.parts] for c in key.codecs]
    g = torch.empty(n, dtype=key.gradient, device="meta")
    with torch.no_grad(), _TrafficCounter() as counter:
        update(key, kept[0], g, kept[1:], first_scalars(optimizer, key)[0]._replace(factor=1.0))
    return counter.operations, counter.bytes / n


def prologue_traffic(optimizer: Update, key: Key, slots: list[ParamSlot], step: int = 1) -> tuple[int, int]:
    """Operations of a prologue, and bytes they read and write, in a step: counted on tensors without memory."""
    counter = _TrafficCounter()
    for number in sorted({m.group for m in slots}):
        group = optimizer.param_groups[number]
        h = step_scalars_for(optimizer, group, step).h
        params = [torch.empty_like(local(m.p), device="meta") for m in slots if m.group == number]
        gradients = [torch.empty_like(p, dtype=key.gradient) for p in params]
        states = [optimizer.first_kept(p, group) for p in params]
        with torch.no_grad(), counter:
            optimizer.prologue(plain_group(group), h, params, gradients, states)
    return counter.operations, counter.bytes


def sums_traffic(optimizer: Update, key: Key, slots: list[ParamSlot], step: int) -> tuple[int, int]:
    """Operations in which samples are summed, and bytes they read and write: as of :func:`prologue_traffic`."""
    counter = _TrafficCounter()
    for number in sorted({m.group for m in slots}):
        group = plain_group(optimizer.param_groups[number])
        h, every = step_scalars_for(optimizer, group, step).h, int(group[str(key.variant.sampled)])
        params = [torch.empty_like(local(m.p), device="meta") for m in slots if m.group == number]
        states = [optimizer.first_kept(p, group) for p in params]
        numel = torch.empty(len(params), dtype=torch.float64, device="meta")
        parts = [[torch.empty_like(p, dtype=dtype) for p in params] for dtype in (*key.codecs[0].dtypes, key.gradient)]
        with torch.no_grad(), counter:
            values, *_, gradients = (samples(own, every).to(key.compute) for own in parts)
            optimizer.sums(Measured(group, h, params, states, numel, ()), values, gradients)
    return counter.operations, counter.bytes


class _TrafficCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            out = result if isinstance(result, (tuple, list)) else [result]
            # copy_ takes what it overwrites as an argument, but does not read it.
            read = args[1:] if func is torch.ops.aten.copy_.default else args
            self.bytes += sum(t.nbytes for t in (*read, *out) if isinstance(t, Tensor))
        return result
