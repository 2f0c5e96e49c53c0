"""Numbers of many parameters in one piece of memory."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 128  # numbers

_CODES = {torch.float32: "f", torch.float64: "d"}


class Column:
    """Numbers on the CPU, one a parameter, written and compared where they lie: an operation of torch takes longer than
    all else that is done to them. Where all are alike, nothing of their size is allocated: to ask for 4 kB takes up to
    0.3 ms after a backward pass, as glibc then tidies up the many small pieces that were freed.

    Args:
        tensor: the memory, ``(parameters,)``.
    """

    __slots__ = ("_after", "_before", "_bits", "_bytes", "_pack", "_values", "_written", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        memory = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        code = _CODES[tensor.dtype]
        self._bytes, self._pack = memory, Struct(code).pack
        self._values: Any = memory.cast(code)  # type: ignore[call-overload]
        self._bits: Any = memory.cast("I") if tensor.itemsize == 4 else memory.cast("Q")  # NaN is unlike itself
        self._before, self._after = self._bits[:-1], self._bits[1:]
        self._written: Any = None  # what was written last: into all, or an array with a number for each

    def start(self, cell: int, value: float) -> float:
        """Write it into a cell; returns it as that keeps it. Then :meth:`take` takes note of all cells."""
        self._values[cell] = value
        return float(self._values[cell])

    def take(self) -> None:
        """Take what the cells hold now for what was written last."""
        self._written = self._bits[0] if self._before == self._after else array(self._bits.format, self._bits)

    def untouched(self) -> bool:
        """Whether all cells hold what was written last."""
        if type(self._written) is int:
            return bool(self._bits[0] == self._written and self._before == self._after)
        return bool(self._bits == self._written)

    def write(self, value: float, cells: Sequence[int] | None = None) -> float:
        """Write it into some cells, or into all; returns it as they keep it."""
        values = self._values
        if cells is None:
            memory, count = self._bytes, len(values)
            if count <= AT_ONCE:
                memory[:] = self._pack(value) * count
            else:
                some = self._pack(value) * AT_ONCE
                for start in range(0, len(memory), len(some)):
                    memory[start : start + len(some)] = some[: len(memory) - start]
            self._written = self._bits[0]
            return float(values[0])
        if type(self._written) is int:
            self._written = array(self._bits.format, self._bits)
        for i in cells:
            values[i] = value
        bits = self._bits[cells[0]]
        for i in cells:
            self._written[i] = bits
        return float(values[cells[0]])

    def cells(self) -> list[Tensor]:
        """0-dim tensors in its memory, each with a storage of its own: who saves one saves no other's memory."""
        memory = (ctypes.c_char * self.tensor.nbytes).from_address(self.tensor.data_ptr())
        memory.column = self.tensor  # type: ignore[attr-defined]  # which they hold so
        dtype, size = self.tensor.dtype, self.tensor.itemsize
        every = range(0, self.tensor.nbytes, size)
        return [torch.frombuffer(memory, dtype=dtype, count=1, offset=i).squeeze_() for i in every]
