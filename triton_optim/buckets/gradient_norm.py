"""The norm of many gradients as one vector: what a step does with it, and sums of powers in torch operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Update

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
        check_finite: whether to skip the step where one is not finite, and to look for it where nobody has.
        max_norm: the largest norm allowed; None for any.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    check_finite: bool = False
    max_norm: float | None = None

    @property
    def needs_norm(self) -> bool:
        """Whether the gradients are read before the update."""
        return self.max_norm is not None or (self.check_finite and self.found_inf is None)


def scaling_of(optimizer: Update) -> Scaling | None:
    """What a step of an optimizer does with all gradients now; None where that is nothing."""
    max_norm = optimizer.max_grad_norm
    if optimizer.amp is None:
        return None if max_norm is None else limiting(max_norm)
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    grad_scale = scale if isinstance(scale, Tensor) else None
    found_inf = found if isinstance(found, Tensor) else None  # of no gradients at all torch's scaler says 0
    looks = grad_scale is not None or found_inf is not None
    return Scaling(grad_scale, found_inf, looks, max_norm) if looks or max_norm is not None else None


@lru_cache(maxsize=64)
def limiting(max_norm: float) -> Scaling:
    """What does nothing but limit the norm. It is kept: to make one takes as long as a short launch."""
    return Scaling(max_norm=max_norm)


@cache
def exact_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


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
    beside = device.type != "cpu"  # what comes to the host is read there at once
    rows = [part.to(device, exact_dtype(device), non_blocking=beside) for part in partials]
    return torch.cat(rows) if rows else torch.zeros(1, 2, dtype=exact_dtype(device), device=device)


def norm_from(partials: Tensor, norm: Norm) -> Tensor:
    """The norm, 0-dim."""
    if norm.kind == "inf":
        return partials[:, 0].amax()
    whole = partials[:, 0].sum()
    return whole.sqrt() if norm.kind == "2" else whole ** (1 / norm.power)


class GradientStats:
    """What a step found of all gradients, and does with them: 0-dim tensors on one device, of one ``(4,)``.

    Attributes:
        tensor: all four.
        factor: what the gradients are multiplied by.
        skip: 1 where the step is skipped, else 0.
        norm: theirs, without what a scaler multiplied them by.
        not_finite: not 0 where one of their elements is not finite.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def tensor(self) -> Tensor:
        """All four."""
        return self._tensor

    def table(self) -> Any:
        """What a kernel that reads them is given."""
        return self.tensor

    factor = property(lambda self: self.tensor[0], doc="What the gradients are multiplied by.")
    skip = property(lambda self: self.tensor[1], doc="1 where the step is skipped, else 0.")
    norm = property(lambda self: self.tensor[2], doc="Theirs, without what a scaler multiplied them by.")
    not_finite = property(lambda self: self.tensor[3], doc="Not 0 where one of their elements is not finite.")

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._tensor.device

    def on(self, device: torch.device) -> GradientStats:
        """The same on another device; the host does not wait, but for its own."""
        if self.device == device:
            return self
        return GradientStats(self.tensor.to(device, non_blocking=device.type != "cpu"))


def gradient_stats_from(partials: Tensor | None, scaling: Scaling, device: torch.device) -> GradientStats:
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
        if scaling.check_finite and scaling.found_inf is None:
            skip = (faults != 0).to(wide)
    return GradientStats(torch.stack((factor, skip, norm, faults)))


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of this norm to at most `max_norm`, as in torch; NaN where it is."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
