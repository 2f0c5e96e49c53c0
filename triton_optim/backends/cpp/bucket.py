"""The C++ backend: one call updates every parameter of a bucket on a CPU, by a loop made of the rule's syntax tree."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from ctypes import c_void_p, cast
from functools import cache, cached_property
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from ...buckets.bucket import Bucket
from ...buckets.gradient_norm import EUCLIDEAN
from ...buckets.key import Key
from ...buckets.slots import ParamSlot
from ...buckets.step_scalars import StepScalars, first_scalars
from ...kernels.language import python_function
from ...precision.codecs import Codec
from ...spec import Update
from ...util.cpp_build import library
from .chunks import Chunks
from .norm import chunk_sums, sums_of
from .source import measure_source, source

# Where in what a step is given: see kernels/cpp/multi_tensor.h. The first four are fixed.
GRADIENTS, ROWS, KEYS, SUMS, THREADS = range(4, 9)


@cache
def step_of(rule: Any, scalars: Any, codecs: tuple[Codec, ...], gradient: torch.dtype, averaged: bool) -> Any:
    """The compiled update, one for a process; see kernels/cpp/multi_tensor.h. A failure is not remembered here."""
    return step_in(source(rule, scalars, codecs, gradient, averaged))


@cache
def measure_of(measure: Any, scalars: Any, codecs: tuple[Codec, ...], gradient: torch.dtype, averaged: bool) -> Any:
    """The compiled sums of a measure, one for a process."""
    return step_in(measure_source(measure, scalars, codecs, gradient, averaged))


def step_in(text: str) -> Any:
    """The function of a compiled source."""
    step = library(text).step
    step.argtypes, step.restype = [c_void_p], None
    return step


class CppBucket(Bucket):
    """Holds the loop's tables: chunks and tensors, made once; gradients and rows, refreshed."""

    takes_addresses = True

    def __init__(self, optimizer: Update, key: Key, slots: list[ParamSlot]) -> None:
        super().__init__(optimizer, key, slots)
        self.chunks = Chunks(self.numels)
        kept = [[part.data_ptr() for parts in self.parts_of(m) for part in parts] for m in slots]
        own = zip(self.numels, kept, strict=True)
        self.tensors = torch.tensor([[numel, 0, *addresses] for numel, addresses in own], device="cpu")
        self._given = array("q", (*self.chunks.arguments(), self.tensors.data_ptr(), *[0] * 5))
        self._at, _ = self._given.buffer_info()
        self._given[KEYS] = self.tensors.data_ptr()  # where no bits are random, none are read
        self._keys: Tensor | None = None  # of this step, held for the loop
        self.call, self._measure, width = self.compile(optimizer, key, slots)
        self._call_at = cast(self.call, c_void_p).value or 0
        self._row_struct = Struct(f"{width}d")
        self._cells = array("d")

    @classmethod
    def compile(cls, optimizer: Update, key: Key, slots: list[ParamSlot], ahead: bool = False) -> Any:
        scalars: Any = type(first_scalars(optimizer, key)[0].h)
        if optimizer.scales_gradients:
            sums_of(EUCLIDEAN.kind, key.gradient)
        averaged = key.variant.averaged
        width = 1 + len(scalars._fields) + averaged
        what = scalars, key.codecs, key.gradient, averaged
        measure = key.variant.measure and measure_of(key.variant.measure, *what)
        return step_of(key.variant.rule, *what), measure, width

    def norms(self) -> Tensor | None:
        if self.key.variant.prologue:  # the gradients are not in the table yet
            return None
        return chunk_sums(self.chunks, self.gradient_addresses, self.key.gradient, EUCLIDEAN)

    def run(self, rows: list[StepScalars | None]) -> None:
        self._give(rows)
        if self._gathered and self._gatherer is not None:
            self._gatherer.run(self._call_at, self._at)
            return
        self.call(self._at)
        self.mark_written()

    @cached_property
    def stretches(self) -> list[list[tuple[int, int, int]]]:
        return [self.chunks.elements(*portions) for portions in self.chunks.stretches]

    def run_stretches(
        self, rows: list[StepScalars | None], before: Callable[[int], object], after: Callable[[int], object]
    ) -> None:
        self._give(rows)
        for number, portions in enumerate(self.chunks.stretches):
            before(number)
            some = array("q", (*self.chunks.arguments(portions), *self._given[3:]))
            self.call(some.buffer_info()[0])
            after(number)
        self.mark_written()

    def measure(self) -> Tensor:
        count = python_function(self.key.variant.measure).returned
        found = torch.zeros(len(self.chunks), count, dtype=torch.float64, device="cpu")
        self._give(self.rows_to_run(), found.data_ptr())
        self._measure(self._at)
        return found.new_zeros(len(self.slots), count).index_add_(0, self.chunks.chunks[:, 0], found)

    def _give(self, rows: list[StepScalars | None], sums: int | None = None) -> None:
        """Write down what the loop is given; `sums` is where a measure puts its own, which needs no random bits."""
        if self.regrouped:
            self.tensors[:, 1] = torch.tensor(self.row_of, device="cpu")
            self.regrouped = False
        packer, given = self._row_struct, self._given
        if len(self._cells) * 8 != len(rows) * packer.size:
            self._cells = array("d", bytes(len(rows) * packer.size))
            given[ROWS] = self._cells.buffer_info()[0]
        start, averaged = 0, self.key.variant.averaged
        for row in rows:
            if row is not None:
                if averaged:
                    packer.pack_into(self._cells, start, row.factor, *row.h, row.weight)
                else:
                    packer.pack_into(self._cells, start, row.factor, *row.h)
            start += packer.size
        given[GRADIENTS] = self.gradient_addresses.buffer_info()[0]
        given[SUMS], given[THREADS] = sums or 0, self.chunks.threads()
        if self.random and sums is None:
            self._keys = self.random_keys()
            given[KEYS] = self._keys.data_ptr()
