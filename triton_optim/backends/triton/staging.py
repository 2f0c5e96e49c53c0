"""Numbers that the host writes from step to step and a device reads, in memory that is kept."""

from __future__ import annotations

import ctypes
from array import array
from typing import Any

import torch

SLOTS = 4  # copies that may be on their way at a time


class Staging:
    """A table on a device that the host writes without waiting for the device, at an address that never changes.

    On its way to a device a table lies in pinned memory, which must stay as it is until it was copied: a ring of such
    tables, each with an event. The host waits only where it is ``SLOTS`` copies ahead of the device.

    Args:
        count: numbers in the table.
        dtype: of the numbers.
        device: where they are read.

    Attributes:
        tensor: ``(count,)`` on the device, aligned to 16 bytes; zeros at first.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(count, dtype=dtype, device=device)
        self._address = self.tensor.data_ptr() if device.type == "cpu" else 0
        self._ring: list[tuple[torch.Tensor, Any]] = []
        self._next = 0

    def push(self, values: array[Any]) -> None:
        """Bring the table, or so many numbers at its start, to the device, in the order of the current stream."""
        start, length = values.buffer_info()
        size = length * values.itemsize
        if self._address:
            ctypes.memmove(self._address, start, size)
            return
        module = torch.get_device_module(self.tensor.device)
        if len(self._ring) < SLOTS:
            pinned = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device="cpu", pin_memory=True)
            self._ring.append((pinned, module.Event()))
            self._next = len(self._ring) - 1
        pinned, copied = self._ring[self._next]
        self._next = (self._next + 1) % SLOTS
        copied.synchronize()  # of an event that was never recorded it returns at once
        ctypes.memmove(pinned.data_ptr(), start, size)
        table = self.tensor
        if length < len(table):
            table, pinned = table[:length], pinned[:length]
        table.copy_(pinned, non_blocking=True)
        copied.record(module.current_stream(self.tensor.device))
