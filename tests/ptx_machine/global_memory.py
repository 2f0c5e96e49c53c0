"""This process's memory as a GPU's global memory: every access is checked, kept, and can be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Report = Callable[[str, Array, str], None]  # kind of the fault, the accesses that are wrong, details

_LOWEST, _HIGHEST = 1 << 12, 1 << 47


class _AddressSpace:
    """All addresses as one array of items of so many bytes."""

    def __init__(self, size: int) -> None:
        count = (_HIGHEST - _LOWEST) // size
        self.__array_interface__ = {"data": (_LOWEST, False), "shape": (count,), "typestr": f"<u{size}", "version": 3}


_ALL = {size: np.asarray(_AddressSpace(size)) for size in (1, 2, 4, 8)}


class Span(NamedTuple):
    """Bytes that a kernel may touch, from `start` to before `stop`.

    Attributes:
        absent: nothing lies there. Loads give 0 and stores go nowhere: for tensors larger than memory.
    """

    start: int
    stop: int
    name: str
    absent: bool = False


class Access(NamedTuple):
    """One instruction's accesses: addresses, bytes each, whose they are, and what was stored; None for loads."""

    address: Array
    size: int
    who: Array  # (3, accesses): the program, the warp, how many barriers the program had passed
    stored: Array | None


class GlobalMemory:
    """Memory of which some spans may be touched. Those that overlap count as one."""

    def __init__(self, spans: Iterable[Span]) -> None:
        merged: list[Span] = []
        for span in sorted(spans):
            if merged and span.start < merged[-1].stop:
                merged[-1] = merged[-1]._replace(stop=max(span.stop, merged[-1].stop))
            elif span.start < span.stop:
                merged.append(span)
        self._spans = merged
        # Before the first span, one of no bytes, so that every address lies after the start of one.
        self._starts = np.array([0, *(span.start for span in merged)], np.int64)
        self._stops = np.array([0, *(span.stop for span in merged)], np.int64)
        self._absent = np.array([False, *(span.absent for span in merged)])
        self.accesses: list[Access] = []
        self._before: list[tuple[int, Array, Array]] = []  # size, index and values that were stored over

    def _look(self, address: Array, size: int, count: int, report: Report) -> tuple[Array, Array, Array]:
        """Which accesses are right; which of these lie in memory that is there; the index of each item of those."""
        span = np.searchsorted(self._starts, address, "right") - 1
        crooked = address % (size * count) != 0
        outside = address + size * count > self._stops[span]
        if crooked.any():
            report("misaligned", crooked, f"{size * count} bytes at {int(address[crooked][0]):#x}")
        if outside.any():
            first = int(address[outside][0])
            report("out of bounds", outside, f"{size * count} bytes at {first:#x}, {self._nearest(first)}")
        right = ~(crooked | outside)
        there = right & ~self._absent[span]
        index = ((address[there] - _LOWEST) // size)[:, None] + np.arange(count)
        return right, there, index

    def _nearest(self, address: int) -> str:
        number = int(np.searchsorted(self._starts, address, "right")) - 2
        if number < 0:
            return "before every tensor"
        start, stop, name, _ = self._spans[number]
        if address < stop:
            return f"across the end of {name}"
        return f"{address - stop} bytes after the end of {name} of {stop - start} bytes"

    def load(self, address: Array, size: int, count: int, who: Array, report: Report) -> Array:
        """``(accesses, count)`` items of `size` bytes; 0 where an access is wrong."""
        right, there, index = self._look(address, size, count, report)
        out = np.zeros((len(address), count), f"<u{size}")
        out[there] = _ALL[size][index]
        self.accesses.append(Access(address[right], size * count, who[:, right], None))
        return out

    def store(self, address: Array, values: Array, who: Array, report: Report) -> None:
        """Store ``(accesses, count)`` unsigned items, but those of accesses that are wrong."""
        size, count = values.dtype.itemsize, values.shape[1]
        right, there, index = self._look(address, size, count, report)
        self._before.append((size, index, _ALL[size][index]))
        _ALL[size][index] = values[there]
        self.accesses.append(Access(address[right], size * count, who[:, right], values[right]))

    def undo(self) -> None:
        """Bring back what all stores replaced."""
        for size, index, values in reversed(self._before):
            _ALL[size][index] = values

    def stored(self) -> list[Access]:
        """The stores, in order."""
        return [access for access in self.accesses if access.stored is not None and len(access.address)]

    def races(self) -> tuple[int, str]:
        """How many items one thread stores and another touches, with nothing between that orders them; an example.

        Programs are not ordered. Barriers order the warps of a program; a warp's threads run in step. That several
        store the same value is no race: Triton lets them, for scalars.
        """
        stores = self.stored()
        if not stores:
            return 0, ""
        # Accesses are aligned, so that each consists of whole pieces of the smallest size.
        piece = min(8, *(access.size for access in self.accesses if len(access.address)))
        written = np.unique(np.concatenate([_pieces(access, piece) for access in stores]))
        parts = []
        for access in self.accesses:
            at = _pieces(access, piece)
            touched = written[np.minimum(np.searchsorted(written, at), len(written) - 1)] == at
            who = [np.repeat(part, access.size // piece)[touched] for part in access.who]
            is_store = access.stored is not None
            value = np.ascontiguousarray(access.stored).view(f"<i{piece}").ravel() if is_store else np.zeros_like(at)
            parts.append((at[touched], *who, value[touched].astype(np.int64), np.full(int(touched.sum()), is_store)))
        at, program, warp, epoch, value, is_store = (np.concatenate(part) for part in zip(*parts, strict=True))
        between_programs = _clashes((at,), program, value, is_store)
        between_warps = _clashes((at, program, epoch), warp, value, is_store)
        wrong = np.concatenate((between_programs, between_warps))
        if not len(wrong):
            return 0, ""
        return len(wrong), f"{'programs' if len(between_programs) else 'warps'} meet at {int(wrong[0]):#x}"


def _pieces(access: Access, size: int) -> Array:
    return (access.address[:, None] + np.arange(0, access.size, size)).ravel()


def _clashes(keys: tuple[Array, ...], who: Array, value: Array, is_store: Array) -> Array:
    """The addresses, `keys[0]`, of accesses with equal keys that race: of several `who`, one of which stores."""
    order = np.lexsort(keys)
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    first = np.flatnonzero(new)
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max

    def over(function: np.ufunc, array: Array) -> Array:
        return function.reduceat(array[order], first)

    several = over(np.minimum, who) != over(np.maximum, who)
    loads, stores = over(np.logical_or, ~is_store), over(np.logical_or, is_store)
    least, most = (over(f, np.where(is_store, value, end)) for f, end in ((np.minimum, high), (np.maximum, low)))
    return keys[0][order][first][several & stores & (loads | (least != most))]
