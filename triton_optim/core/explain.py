"""What the dispatcher chose for an optimizer, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch.optim import Optimizer

from ..backends.costs import cost
from ..buckets.key import Key
from ..buckets.slots import ParamSlot
from ..engine.entries import entries_of, sort_params
from ..precision.codecs import Codec
from ..util.layout import local
from ..util.table import table
from .optimizer import RuleOptimizer
from .unwrap import unwrap_optimizer


@dataclass(frozen=True)
class BucketReport:
    """One bucket: parameters that a backend updates together."""

    backend: str
    reason: str
    device: torch.device
    tensors: int
    elements: int
    dtypes: dict[str, torch.dtype]  # a role: "p", "g" and the states' names
    kept: dict[str, str]  # the same, where it is more than a dtype: "bfloat16 kahan", "int8"
    launches: int  # kernels, compiled calls or torch operations a step
    bytes_per_parameter: float  # read and written, a step


class Explanation(Sequence[BucketReport]):
    """The buckets of an optimizer; prints as a table."""

    def __init__(self, rows: Sequence[BucketReport]) -> None:
        self._rows = list(rows)

    @overload
    def __getitem__(self, index: int) -> BucketReport: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[BucketReport]: ...
    def __getitem__(self, index: int | slice) -> BucketReport | Sequence[BucketReport]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BucketReport]:
        return iter(self._rows)

    def __repr__(self) -> str:
        header = ["backend", "device", "tensors", "elements", "dtypes", "launches", "bytes/parameter", "reason"]
        rows = [
            [
                r.backend,
                str(r.device),
                f"{r.tensors:,}",
                f"{r.elements:,}",
                ", ".join(
                    f"{role} {r.kept.get(role, str(dtype).removeprefix('torch.'))}" for role, dtype in r.dtypes.items()
                ),
                f"{r.launches:,}",
                f"{r.bytes_per_parameter:g}",
                r.reason,
            ]
            for r in self
        ]
        return table(header, rows)


def explain(optimizer: Optimizer) -> Explanation:
    """What runs each bucket of `optimizer`, why, in how many launches, and how many bytes it moves.

    Before the first step, gradients and states are taken to be like their parameters. Nothing is changed.

    Args:
        optimizer: one of this package's, or what a trainer made of it.

    Returns:
        A sequence of :class:`BucketReport`, which prints as a table.

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = triton_optim.AdamW(model.parameters(), backend="eager")
        >>> bucket, = triton_optim.explain(optimizer)
        >>> bucket.backend, bucket.tensors, bucket.elements
        ('eager', 2, 10)
    """
    optimizer = unwrap_optimizer(optimizer)
    if optimizer.engine.plan is not None:
        buckets = {bucket.key: bucket.slots for bucket in optimizer.engine.plan.buckets}
    else:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        buckets = sort_params(optimizer, entries_of(optimizer, params, [p.grad for p in params], every=True))
    return Explanation([report(optimizer, key, slots) for key, slots in buckets.items()])


def words_of(codec: Codec) -> str:
    """What a codec is called here, such as "bfloat16 kahan"."""
    kind, dtype = codec.name.split()[0], codec.dtypes[0]
    return f"{str(dtype).removeprefix('torch.')} {kind}" if dtype.is_floating_point else kind


def report(optimizer: RuleOptimizer, key: Key, slots: list[ParamSlot]) -> BucketReport:
    """One row of an explanation."""
    elements = sum(local(m.p).numel() for m in slots)
    kept = zip(("p", *key.variant.state_names), key.codecs, strict=True)
    return BucketReport(
        key.choice.backend,
        key.choice.reason,
        key.device,
        len(slots),
        elements,
        dict(zip(("p", "g", *key.variant.state_names), key.dtypes, strict=True)),
        {role: words_of(codec) for role, codec in kept if codec.name != "plain"},
        *cost(optimizer, key, slots),
    )
