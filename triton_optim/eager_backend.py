"""The last resort: the rule as torch operations, a parameter at a time. It runs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .averaging import average_of
from .bucket import Bucket, Key
from .codecs import read, write
from .hyperparameters import exact_number, plain_group
from .kernels.language import results, torch_form
from .layout import local, places
from .members import Member
from .random_bits import bits_of_elements
from .rows import Row, row_for

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer


class EagerBucket(Bucket):
    keeps_layout = False
    takes_memory = False

    def run(self, rows: list[Row | None]) -> None:
        keys = self.random_keys(rows) if self.random else None
        for i, (m, g) in enumerate(zip(self.members, self.gradients, strict=True)):
            row = rows[self.row_of[i]]
            if g is None or row is None:
                continue
            # Under autograd the parameter itself is written, so that the graph goes through it.
            param, *states = self.parts_of(m)
            if self.key.differentiable:
                param[0] = m.p
            update(self.key, param, g, states, row, None if keys is None else keys[i])

    @classmethod
    def launches(cls, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> int:
        return traffic(optimizer, key)[0] * sum(bool(local(m.p).numel()) for m in members)

    @classmethod
    def bytes_per_parameter(cls, optimizer: RuleOptimizer, key: Key) -> float:
        return traffic(optimizer, key)[1]


def update(
    key: Key, param: list[Tensor], g: Tensor, states: list[list[Tensor]], row: Row, random: Tensor | None = None
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


def traffic(optimizer: RuleOptimizer, key: Key) -> tuple[int, float]:
    """Operations a parameter, and bytes they read and write an element: counted on tensors without memory."""
    n = 1024
    kept = [
        [torch.empty(n // each, dtype=dtype, device="meta") for dtype, each in zip(c.dtypes, c.each, strict=True)]
        for c in key.codecs
    ]
    g = torch.empty(n, dtype=key.gradient, device="meta")
    group = next(group for group in optimizer.param_groups if optimizer.running_variant(group) == key.variant)
    with torch.no_grad(), _TrafficCounter() as counter:
        update(key, kept[0], g, kept[1:], row_for(optimizer, group, 1)._replace(factor=1.0))
    return counter.operations, counter.bytes / n


def prologue_traffic(optimizer: RuleOptimizer, key: Key, members: list[Member]) -> tuple[int, int]:
    """Operations of a prologue, and bytes they read and write: counted on tensors without memory."""
    counter = _TrafficCounter()
    for number in sorted({m.group for m in members}):
        group = optimizer.param_groups[number]
        h = row_for(optimizer, group, 1).h
        params = [torch.empty_like(local(m.p), device="meta") for m in members if m.group == number]
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
