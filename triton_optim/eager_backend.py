"""The last resort: the rule as torch operations, a parameter at a time. It runs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .bucket import Bucket, Key, Member, Row, plain_group, row_for
from .kernels.language import apply, torch_form
from .layout import layout, local
from .rounding import rounding

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer


class EagerBucket(Bucket):
    keeps_layout = False

    def run(self, rows: list[Row | None]) -> None:
        keys = self.random_keys(rows) if self.key.rounded else None
        for i, (m, g) in enumerate(zip(self.members, self.gradients, strict=True)):
            row = rows[self.row_of[i]]
            if g is None or row is None:
                continue
            # Under autograd the parameter itself is written, so that the graph goes through it.
            p = m.p if self.key.differentiable else local(m.p).detach()
            update(self.key, [p, g, *self.states_of(m)], row, None if keys is None else keys[i])

    @classmethod
    def launches(cls, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> int:
        return traffic(optimizer, key)[0] * sum(bool(local(m.p).numel()) for m in members)

    @classmethod
    def bytes_per_parameter(cls, optimizer: RuleOptimizer, key: Key) -> float:
        return traffic(optimizer, key)[1]


def update(key: Key, tensors: list[Tensor], row: Row, random: Tensor | None = None) -> None:
    """One parameter's step in torch operations, in place; `random` is its row of rounding.tensor_keys."""
    if tensors[0].is_complex():
        tensors = [torch.view_as_real(t) for t in tensors]
    # A rule may hand its argument to autograd, which must not see it change afterwards.
    values = [t.clone() for t in tensors] if key.differentiable else tensors
    values = [t.to(key.compute) for t in values]
    if row.factor != 1:
        values[1] = values[1] * row.factor
    rounded = None if random is None else rounding(key.rounded, random, places(tensors[0]), key.dtypes)
    apply(torch_form(key.variant.rule), tensors, values, row.h, rounded)


def places(tensor: Tensor) -> Tensor:
    """The number of each element, counted as they lie in memory."""
    numbers = torch.arange(tensor.numel(), device=tensor.device)
    dense = layout(tensor) == "dense"
    return numbers.as_strided(tensor.shape, tensor.stride()) if dense else numbers.view(tensor.shape)


def traffic(optimizer: RuleOptimizer, key: Key) -> tuple[int, float]:
    """Operations a parameter, and bytes they read and write an element: counted on tensors without memory."""
    n = 1024
    tensors = [torch.empty(n, dtype=dtype, device="meta") for dtype in key.dtypes]
    group = next(group for group in optimizer.param_groups if optimizer.variant(group) == key.variant)
    with torch.no_grad(), _TrafficCounter() as counter:
        update(key, tensors, row_for(optimizer, group, 1)._replace(factor=1.0))
    return counter.operations, counter.bytes / n


def prologue_traffic(optimizer: RuleOptimizer, key: Key, members: list[Member]) -> tuple[int, int]:
    """Operations of a prologue, and bytes they read and write: counted on tensors without memory."""
    counter = _TrafficCounter()
    for number in sorted({m.group for m in members}):
        group = optimizer.param_groups[number]
        h = row_for(optimizer, group, 1).h
        params = [torch.empty_like(local(m.p), device="meta") for m in members if m.group == number]
        gradients = [torch.empty_like(p, dtype=key.dtypes[1]) for p in params]
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
