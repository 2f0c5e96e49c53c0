"""How the elements of many tensors are shared out among threads on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

# Elements of a chunk, and of a portion, which one thread takes at a time: small enough that no thread waits long for
# another, and large enough that taking it costs nothing. Whole blocks of every codec.
CHUNK = 1 << 14

# Elements from which on other threads are woken.
PARALLEL_FROM = 1 << 14

# Elements of a stretch, where what one thread is done with is on its way while others go on: so many that starting it
# costs nothing, and so few that little waits for the first and the last.
STRETCH, STRETCHES = 1 << 21, 64


class Chunks:
    """The tables of kernels/cpp/multi_tensor.h that depend on nothing but sizes.

    All tensors of a bucket have as many bytes an element, so portions of equal elements are portions of equal bytes.

    Args:
        numels: elements of each tensor.
    """

    def __init__(self, numels: Sequence[int]) -> None:
        sizes = torch.tensor(numels, dtype=torch.int64, device="cpu")
        counts = (sizes + CHUNK - 1) // CHUNK
        tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
        before = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        start = (torch.arange(len(tensor), device="cpu") - before) * CHUNK
        stop = torch.minimum(start + CHUNK, sizes[tensor])
        self.chunks = torch.stack((tensor, start, stop), dim=1).contiguous()
        self.numel = int(sizes.sum())
        portion = ((stop - start).cumsum(0) - 1) // CHUNK
        changes = torch.nonzero(portion[1:] != portion[:-1]).flatten() + 1
        self.first = torch.cat((changes.new_zeros(1), changes, changes.new_tensor([len(tensor)])))

    def __len__(self) -> int:
        return len(self.chunks)

    def arguments(self, portions: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """How many portions there are, and the addresses of the two tables.

        Args:
            portions: those meant, from where to where; by default all.
        """
        start, stop = portions or (0, len(self.first) - 1)
        return stop - start, self.first.data_ptr() + start * self.first.itemsize, self.chunks.data_ptr()

    @cached_property
    def stretches(self) -> list[tuple[int, int]]:
        """The portions, from where to where, of each stretch."""
        each = max(STRETCH, self.numel // STRETCHES) // CHUNK
        count = len(self.first) - 1
        return [(start, min(start + each, count)) for start in range(0, count, each)]

    def elements(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """What portions hold: tensors, and of each the elements from where to where."""
        rows = self.chunks[int(self.first[start]) : int(self.first[stop])]
        tensors, counts = torch.unique_consecutive(rows[:, 0], return_counts=True)
        last = counts.cumsum(0) - 1
        found = torch.stack((tensors, rows[last - counts + 1, 1], rows[last, 2]), dim=1)
        return [(tensor, begin, end) for tensor, begin, end in found.tolist()]

    def threads(self) -> int:
        """How many threads are to share in it now."""
        return torch.get_num_threads() if self.numel >= PARALLEL_FROM else 1
