"""The norm of many gradients as one vector, in one reading pass: sums of powers by backend."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..buckets.gradient_norm import Norm, eager_partial_norms, on_one_device
from ..dispatch import Backend, LaunchError, Request, choose, next_best, this_machine
from ..util.cpp_build import BuildError
from ..util.layout import is_sharded, layout, split_over
from ..util.once import warn_once

# What takes the norm where a backend failed in this process; it is not tried again.
_instead: dict[tuple[Backend, torch.device, torch.dtype, str], Backend] = {}


def partial_norms(tensors: Sequence[Tensor], norm: Norm, backend: Backend | None = None) -> list[Tensor]:
    """Sums of powers of the elements (largest magnitudes for an infinite norm): ``(n, 2)`` a device, in float64; beside
    each sum, whether it holds an element that is not finite (not 0).

    Args:
        tensors: of any devices and dtypes; of sparse ones the elements that they hold.
        backend: None chooses by device and dtype.
    """
    alike: dict[tuple[torch.device, torch.dtype, Backend], list[Tensor]] = {}
    for t in tensors:
        t = t.coalesce().values() if t.is_sparse else t
        alike.setdefault((t.device, t.dtype, backend_of(t, backend)), []).append(t)
    return [partial_norms_by(which, own, norm, backend is not None) for (_, _, which), own in alike.items()]


def partial_norms_by(backend: Backend, tensors: Sequence[Tensor], norm: Norm, in_step: bool) -> Tensor:
    """:func:`partial_norms` of tensors of one device and dtype. Where a backend fails, the next best one takes over.

    Args:
        in_step: whether a step asks, which goes on by itself where a kernel cannot be started.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    while backend != "eager":
        key = backend, device, dtype, norm.kind
        if key in _instead:
            backend = _instead[key]
            continue
        try:
            module = importlib.import_module(f".{backend}.norm", __package__)
            return cast(Tensor, module.partial_norms(tensors, norm))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or (in_step and isinstance(error, LaunchError)):
                raise
            _instead[key] = next_best(backend, Request(device.type, dtype), this_machine())
            why = str(error) if isinstance(error, (BuildError, LaunchError)) else f"{type(error).__name__}: {error}"
            warn_once(
                f"the {backend} backend failed to compile: {why}. The {_instead[key]} backend takes the norm instead."
            )
    return eager_partial_norms(tensors, norm)


def backend_of(t: Tensor, backend: Backend | None) -> Backend:
    """What adds up the powers of a tensor's elements."""
    if t.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or layout(t) != "dense":
        return "eager"
    return backend or choose(Request(t.device.type, t.dtype), this_machine()).backend


def over_shards(params: Sequence[Tensor], gradients: Sequence[Tensor], norm: Norm) -> list[Tensor]:
    """:func:`partial_norms` of the gradients of sharded parameters, of which each rank has a part; the same on every
    rank.

    Args:
        params: which say how the gradients are sharded; ordinary tensors among them are counted on each rank.
        gradients: the local part of each.
    """
    groups: dict[Any, list[Tensor]] = {}
    for p, g in zip(params, gradients, strict=True):
        own: Any = p
        groups.setdefault((own.device_mesh, *split_over(p)) if is_sharded(p) else None, []).append(g)
    found = []
    for where, tensors in groups.items():
        rows = on_one_device(partial_norms([t for t in tensors if t.numel()], norm), tensors[0].device)
        if where is None:
            found.append(rows)
            continue
        largest = norm.kind == "inf"
        row = torch.stack((rows[:, 0].amax() if largest else rows[:, 0].sum(), rows[:, 1].sum()))
        if largest:  # MAX may lose a NaN, which goes beside it
            row = torch.stack((row[0].nan_to_num(0.0, math.inf), row[1], row[0].isnan().to(row.dtype)))
        mesh, *dims = where
        for dim in dims:
            operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(row, operation, group=mesh.get_group(dim))
        if largest:
            row = torch.stack((row[0].masked_fill(row[2] != 0, math.nan), row[1]))
        found.append(row.view(1, 2))
    return found
