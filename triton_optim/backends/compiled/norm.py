"""The norm pass compiled by torch.compile: rows of each large tensor; small tensors and what is left, as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ...buckets.gradient_norm import Norm, eager_partial_norms, exact_dtype, on_one_device
from ...util.layout import flat
from .graph import EXAMPLE, PARALLEL_FROM, Graph

ROW = 1024  # elements that are added up before the sum is widened

_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "1": lambda x: x.abs().sum(-1),
    "2": lambda x: (x * x).sum(-1),
    "inf": lambda x: x.abs().amax(-1),
}


@cache
def graph_for(kind: str, dtype: torch.dtype, device: torch.device) -> Graph:
    """The compiled sums of rows, one for a process."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def body(own: list[Tensor], row: Tensor) -> None:
        own[1].copy_(_SUMS[kind](own[0].to(compute)))

    slot: list[tuple[torch.dtype, tuple[int, ...]]] = [(dtype, (ROW,)), (compute, ())]
    return Graph(f"norm_{kind}", body, slot, False, torch.zeros(1, device=device), EXAMPLE // ROW, True)


def partial_norms(tensors: Sequence[Tensor], norm: Norm) -> Tensor:
    """See norms.partial_norms; tensors of one device and dtype."""
    if norm.kind not in _SUMS:
        return eager_partial_norms(tensors, norm)
    own, rest = [], []
    for t in map(flat, tensors):
        whole = len(t) // ROW * ROW if len(t) >= PARALLEL_FROM else 0
        if whole:
            own.append(t[:whole].view(-1, ROW))
        if whole < len(t):
            rest.append(t[whole:])
    found = []
    if rest:
        together = torch.cat(rest)
        whole = len(together) // ROW * ROW if len(together) >= PARALLEL_FROM else 0
        if whole:
            own.append(together[:whole].view(-1, ROW))
        if whole < len(together):
            found.append(eager_partial_norms([together[whole:]], norm))
    if own:
        device, dtype = own[0].device, own[0].dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        sums = torch.empty(sum(map(len, own)), dtype=compute, device=device)
        arguments = [t for pair in zip(own, torch.split(sums, [len(t) for t in own]), strict=True) for t in pair]
        graph_for(norm.kind, dtype, device)(torch.zeros(1, device=device), arguments)
        wide = exact_dtype(device)
        sums = sums.to(wide)
        whole_sum = sums.amax() if norm.kind == "inf" else sums.sum()
        faults = ~whole_sum.isfinite()
        if device.type == "cpu" and faults:  # or a square that float32 has no room for
            faults = ~torch.stack([t.isfinite().all() for t in own]).all()
        found.append(torch.stack((whole_sum, faults.to(wide))).view(1, 2))
    return on_one_device(found, tensors[0].device)
