"""The last resort: the rule as torch operations, a parameter at a time. It runs anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...buckets.bucket import Bucket
from ...buckets.key import Key
from ...buckets.slots import ParamSlot
from ...buckets.step_scalars import StepScalars, step_scalars_for
from ...spec import Update
from ...util.hyperparameters import plain_group
from ...util.layout import local
from ..update import measure, update


class EagerBucket(Bucket):
    keeps_layout = False
    takes_memory = False

    def run(self, rows: list[StepScalars | None]) -> None:
        keys = self.random_keys() if self.random else None
        for i, (m, g) in enumerate(zip(self.slots, self.gradients, strict=True)):
            row = rows[self.row_of[i]]
            if g is None or row is None:
                continue
            # Under autograd the parameter itself is written, so that the graph goes through it.
            param, *states = self.parts_of(m)
            if self.key.differentiable:
                param[0] = m.p
            update(self.key, param, g, states, row, None if keys is None else keys[i])

    def measure(self) -> Tensor:
        return measure(self)

    @classmethod
    def launches(cls, optimizer: Update, key: Key, slots: list[ParamSlot]) -> int:
        return traffic(optimizer, key)[0] * sum(bool(local(m.p).numel()) for m in slots)

    @classmethod
    def bytes_per_parameter(cls, optimizer: Update, key: Key) -> float:
        return traffic(optimizer, key)[1]


def traffic(optimizer: Update, key: Key) -> tuple[int, float]:
    """Operations a parameter, and bytes they read and write an element: counted on tensors without memory."""
    n = 1024
    kept = [
        [
            torch.empty(n // per_item, dtype=dtype, device="meta")
            for dtype, per_item in zip(c.dtypes, c.elements_per_item, strict=True)
        ]
        for c in key.codecs
    ]
    g = torch.empty(n, dtype=key.gradient, device="meta")
    group = next(group for group in optimizer.param_groups if optimizer.running_variant(group) == key.variant)
    with torch.no_grad(), _TrafficCounter() as counter:
        update(key, kept[0], g, kept[1:], step_scalars_for(optimizer, group, 1)._replace(factor=1.0))
    return counter.operations, counter.bytes / n


def prologue_traffic(optimizer: Update, key: Key, slots: list[ParamSlot]) -> tuple[int, int]:
    """Operations of a prologue, and bytes they read and write: counted on tensors without memory."""
    counter = _TrafficCounter()
    for number in sorted({m.group for m in slots}):
        group = optimizer.param_groups[number]
        h = step_scalars_for(optimizer, group, 1).h
        params = [torch.empty_like(local(m.p), device="meta") for m in slots if m.group == number]
        gradients = [torch.empty_like(p, dtype=key.gradient) for p in params]
        states = [optimizer.prologue_state(p, group) for p in params]
        with torch.no_grad(), counter:
            optimizer.prologue(plain_group(group), h, params, gradients, states)
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
