"""What becomes of the sums of the norm pass, on the device: formed by one launch of its own, or by the one that forms
the rows of scalars.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...buckets.gradient_norm import EUCLIDEAN, GradientStats, Scaling
from ...dispatch import this_machine
from ...kernels import gradient_norm as kernels
from ...util.on_device import capturing
from .launch import Launcher, warp_size

THREADS = 256  # a program
ROWS = 64  # that are allocated at a time


class TritonGradientStats(GradientStats):
    """What becomes of the sums of one step, formed by the kernel that needs it first.

    Args:
        partials: of all gradients, ``(n, 2)``; None where they were not read.
        scaling: what the step is to do with them.
        max_norm: the largest norm allowed, infinite for any, float64 ``(1,)`` on the device.
        rows: of the device.
    """

    def __init__(self, partials: Tensor | None, scaling: Scaling, max_norm: Tensor, rows: StatsRows) -> None:
        self._device = device = rows.device
        self._block, self._row, out = rows.take()
        # In the order of the kernels' arguments; what is not read is any table.
        sums, count = (out, 0) if partials is None else (partials, partials.shape[0])
        scale = out if scaling.grad_scale is None else placed(scaling.grad_scale, device)
        found = out if scaling.found_inf is None else placed(scaling.found_inf, device)
        self.arguments = (out, sums, count, max_norm, scale, found)
        self.kind = kind_of(scaling)
        self.is_formed = False

    @property
    def tensor(self) -> Tensor:
        """All four; formed by a launch where no other kernel did."""
        self.table()
        return self._block[self._row]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._device

    def table(self) -> Any:
        """What a kernel that reads them is given; formed likewise."""
        if not self.is_formed:
            stats_launcher(self.kind, self._device)(1, *self.arguments)
            self.is_formed = True
        return self.arguments[0]


class StatsRows:
    """Rows of four numbers on a device, each handed out once: to allocate one takes as long as a launch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._interpreted = this_machine().interpreter
        self._left: Iterator[tuple[Tensor, int, Any]] = iter(())

    def take(self) -> tuple[Tensor, int, Any]:
        """A row that nobody else has: the tensor that it is a row of, its number, and what a kernel is given. A
        captured graph has its own memory.
        """
        if capturing(self.device):
            return next(self._rows(1))
        row = next(self._left, None)
        if row is None:
            left = self._rows(ROWS)
            row, self._left = next(left), left
        return row

    def _rows(self, count: int) -> Iterator[tuple[Tensor, int, Any]]:
        with torch.inference_mode(False):
            block = torch.empty(count, 4, dtype=torch.float64, device=self.device)
        first, size = block.data_ptr(), block.stride(0) * block.itemsize
        for i in range(count):
            yield block, i, block[i] if self._interpreted else first + i * size


@cache
def rows_on(device: torch.device) -> StatsRows:
    """Those of a device, for a whole process."""
    return StatsRows(device)


_READS = EUCLIDEAN.kind
Kind = tuple[str, bool, bool, bool]


def kind_of(scaling: Scaling) -> Kind:
    """What the kernels are compiled for: KIND, SCALED, FOUND, SKIP."""
    grad_scale, found_inf, check_finite, max_norm = scaling
    looks = check_finite and found_inf is None
    needs_norm = looks or max_norm is not None
    return _READS if needs_norm else "none", grad_scale is not None, found_inf is not None, looks


def stats_constants(kind: Kind) -> dict[str, Any]:
    """The constants of a kernel that forms the stats."""
    return {**dict(zip(("KIND", "SCALED", "FOUND", "SKIP"), kind, strict=True)), "BLOCK": 4 * THREADS}


def stats_types(kind: Kind) -> tuple[Any, ...]:
    """The types of its arguments."""
    _, scaled, told, _ = kind
    given = (torch.float32 if there else torch.float64 for there in (scaled, told))
    return (torch.float64, torch.float64, 2, torch.float64, *given)


@cache
def stats_launcher(kind: Kind, device: torch.device) -> Launcher:
    """What starts the kernel that forms the stats alone."""
    options = {"num_warps": THREADS // warp_size(device), "enable_fp_fusion": True}
    return Launcher(kernels.gradient_stats, stats_types(kind), stats_constants(kind) | options, device)


def placed(value: Tensor, device: torch.device) -> Tensor:
    """A 1-element tensor as the kernel reads it."""
    if value.dtype == torch.float32 and value.device == device:
        return value
    return value.detach().to(device, torch.float32, non_blocking=True)
