"""Shared memory of each program, with a look-out for accesses that no barrier orders."""

from __future__ import annotations

import numpy as np

from .global_memory import Report

Array = np.ndarray
_NEVER, _SEVERAL = -1, -2


class SharedMemory:
    """The shared memory of all programs.

    Args:
        size: bytes a program.
        poison: what each byte holds that nothing was written to.
    """

    def __init__(self, programs: int, size: int, poison: int) -> None:
        self.size = size
        self._bytes = np.full(programs * size, poison, np.uint8)
        # Of each byte: at which barrier, and by which warp, it was last written and read.
        self._written = np.full((2, programs * size), _NEVER, np.int64)
        self._read = np.full((2, programs * size), _NEVER, np.int64)

    def _look(self, address: Array, width: int, who: Array, report: Report) -> tuple[Array, Array, Array, Array]:
        """Which accesses are right; of those each byte, the barriers passed and the warp."""
        crooked = address % width != 0
        outside = (address < 0) | (address + width > self.size)
        if crooked.any():
            report("misaligned", crooked, f"{width} bytes of shared memory at {int(address[crooked][0]):#x}")
        if outside.any():
            report("out of bounds", outside, f"shared memory at {int(address[outside][0]):#x} of {self.size} bytes")
        right = ~(crooked | outside)
        at = ((who[0] * self.size + address)[right])[:, None] + np.arange(width)
        return right, at, who[2][right][:, None], who[1][right][:, None]

    def load(self, address: Array, size: int, count: int, who: Array, report: Report) -> tuple[Array, bool]:
        """``(accesses, count)`` items, and whether some of them were never written."""
        right, at, epoch, warp = self._look(address, size * count, who, report)
        written_epoch, written_warp = self._written[:, at]
        clash = ((written_epoch == epoch) & (written_warp != warp)).any(1)
        if clash.any():
            report("race", _spread(clash, right), "another warp wrote this shared memory since the last barrier")
        read_epoch, read_warp = self._read[:, at]
        self._read[1][at] = np.where((read_epoch == epoch) & (read_warp != warp), _SEVERAL, warp)
        self._read[0][at] = epoch
        out = np.zeros((len(address), size * count), np.uint8)
        out[right] = self._bytes[at]
        return out.view(f"u{size}"), bool((written_epoch == _NEVER).any())

    def store(self, address: Array, values: Array, who: Array, report: Report) -> None:
        """Store ``(accesses, count)`` unsigned items."""
        new = np.ascontiguousarray(values).view(np.uint8)
        right, at, epoch, warp = self._look(address, new.shape[1], who, report)
        clash = np.zeros(at.shape, bool)
        for then, by in (self._written[:, at], self._read[:, at]):
            clash |= (then == epoch) & (by != warp)
        clash = (clash & (self._bytes[at] != new[right])).any(1)
        if clash.any():
            report("race", _spread(clash, right), "another warp touched this shared memory since the last barrier")
        self._bytes[at] = new[right]
        self._written[0][at], self._written[1][at] = epoch, warp


def _spread(wrong: Array, right: Array) -> Array:
    """Which of all accesses are wrong, from which of the right ones are."""
    out = np.zeros(len(right), bool)
    out[right] = wrong
    return out
