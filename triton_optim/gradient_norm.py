"""The norm of many gradients as one vector, in one reading pass: sums of powers by backend, and what comes of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .cpp_build import BuildError
from .dispatch import Backend, LaunchError, Request, choose, next_best, this_machine
from .layout import is_sharded, layout
from .once import warn_once

_MODULES = {"triton": "triton_norm", "cpp": "cpp_norm", "compiled": "compiled_norm"}

# What takes the norm where a backend failed in this process; it is not tried again.
_instead: dict[tuple[Backend, torch.device, torch.dtype, str], Backend] = {}

_KINDS = {1.0: "1", 2.0: "2", math.inf: "inf"}


class Norm(NamedTuple):
    r""":math:`(\sum |x|^p)^{1/p}`, or the largest :math:`|x|` for an infinite p."""

    power: float

    @property
    def kind(self) -> str:
        """What the kernels call it: "1", "2", "p" or "inf"."""
        return _KINDS.get(self.power, "p")


EUCLIDEAN = Norm(2.0)


class Scaling(NamedTuple):
    """What a step is to do with all gradients alike.

    Attributes:
        grad_scale: what they have been multiplied by, 1-element; None for nothing.
        found_inf: not 0 where one is not finite, 1-element; None where nobody has looked.
        look: whether to skip the step where one is not finite, and to look for it where nobody has.
        max_norm: the largest norm allowed; None for any.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    look: bool = False
    max_norm: float | None = None

    @property
    def reads(self) -> bool:
        """Whether the gradients are read before the update."""
        return self.max_norm is not None or (self.look and self.found_inf is None)


def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


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
            module = importlib.import_module(f".{_MODULES[backend]}", __package__)
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


def eager_partial_norms(tensors: Sequence[Tensor], norm: Norm) -> Tensor:
    """:func:`partial_norms` of tensors of one device in torch operations, one row a tensor that is not empty."""
    wide = exact_dtype(tensors[0].device)
    parts = [t.resolve_conj().abs() if t.is_complex() else t for t in tensors if t.numel()]
    if not parts:  # nothing has no largest magnitude
        return torch.zeros(1, 2, dtype=wide, device=tensors[0].device)
    norms = torch.stack([torch.linalg.vector_norm(t, norm.power, dtype=wide) for t in parts])
    sums = norms if norm.kind == "inf" else norms**norm.power
    return torch.stack((sums, (~sums.isfinite()).to(wide)), dim=1)


def on_one_device(partials: Sequence[Tensor], device: torch.device) -> Tensor:
    """All rows on `device`; one of zeros where there are none."""
    if len(partials) == 1 and partials[0].device == device:
        return partials[0]
    rows = [part.to(device, exact_dtype(device), non_blocking=True) for part in partials]
    return torch.cat(rows) if rows else torch.zeros(1, 2, dtype=exact_dtype(device), device=device)


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
        groups.setdefault((own.device_mesh, tuple(own.placements)) if is_sharded(p) else None, []).append(g)
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
        mesh, placements = where
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
                torch.distributed.all_reduce(row, operation, group=mesh.get_group(dim))
        if largest:
            row = torch.stack((row[0].masked_fill(row[2] != 0, math.nan), row[1]))
        found.append(row.view(1, 2))
    return found


def norm_from(partials: Tensor, norm: Norm) -> Tensor:
    """The norm, 0-dim."""
    if norm.kind == "inf":
        return partials[:, 0].amax()
    whole = partials[:, 0].sum()
    return whole.sqrt() if norm.kind == "2" else whole ** (1 / norm.power)


class Signal:
    """What a step does with all gradients.

    Attributes:
        tensor: the factor, whether the step is skipped (1, else 0), the norm without the scale, and whether an element
            is not finite (not 0).
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def tensor(self) -> Tensor:
        return self._tensor

    def on(self, device: torch.device) -> Signal:
        """The same on another device; the host does not wait."""
        return self if self._tensor.device == device else Signal(self.tensor.to(device, non_blocking=True))


def signal_from(partials: Tensor | None, scaling: Scaling, device: torch.device) -> Signal:
    """What a step does with all gradients, in torch operations.

    Args:
        partials: of :func:`partial_norms`, all on `device`; None where the gradients were not read.
    """
    wide = exact_dtype(device)
    factor, skip = torch.ones((), dtype=wide, device=device), torch.zeros((), dtype=wide, device=device)
    norm = faults = skip
    if scaling.grad_scale is not None:
        factor = scaling.grad_scale.to(device, wide).reshape(()).reciprocal()
    if scaling.found_inf is not None:
        skip = (scaling.found_inf.to(device).reshape(()) != 0).to(wide)
    if partials is not None:
        norm = norm_from(partials, EUCLIDEAN) * factor
        faults = partials[:, 1].sum()
        if scaling.max_norm is not None:
            factor = factor * clip_coefficient(norm, scaling.max_norm)
        if scaling.look and scaling.found_inf is None:
            skip = (faults != 0).to(wide)
    return Signal(torch.stack((factor, skip, norm, faults)))


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of this norm to at most `max_norm`, as in torch; NaN where it is."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
