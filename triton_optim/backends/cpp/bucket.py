"""The C++ backend: one call updates every parameter of a bucket on a CPU, by a loop made of the rule's syntax tree."""

from __future__ import annotations

from array import array
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...buckets.bucket import Bucket
from ...buckets.gradient_norm import EUCLIDEAN
from ...buckets.key import Key
from ...buckets.slots import ParamSlot
from ...buckets.step_scalars import StepScalars, first_scalars
from ...precision.codecs import Codec
from ...spec import Update
from ...util.cpp_build import library
from .chunks import Chunks
from .norm import chunk_sums, sums_of
from .source import source


@cache
def step_of(rule: Any, scalars: Any, codecs: tuple[Codec, ...], gradient: torch.dtype, averaged: bool) -> Any:
    """The compiled update, one for a process; see kernels/cpp/multi_tensor.h. A failure is not remembered here."""
    step = library(source(rule, scalars, codecs, gradient, averaged)).step
    step.argtypes, step.restype = [c_int64, *[c_void_p] * 6, c_int64], None
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
        self._fixed = (*self.chunks.arguments(), self.tensors.data_ptr())
        self.call, self._width = self.compile(optimizer, key, slots)

    @classmethod
    def compile(cls, optimizer: Update, key: Key, slots: list[ParamSlot], ahead: bool = False) -> Any:
        scalars: Any = type(first_scalars(optimizer, key)[0].h)
        if optimizer.scales_gradients:
            sums_of(EUCLIDEAN.kind, key.gradient)
        averaged = key.variant.averaged
        width = 1 + len(scalars._fields) + averaged
        return step_of(key.variant.rule, scalars, key.codecs, key.gradient, averaged), width

    def norms(self) -> Tensor | None:
        if self.key.variant.prologue:  # the gradients are not in the table yet
            return None
        return chunk_sums(self.chunks, self.gradient_addresses, self.key.gradient, EUCLIDEAN)

    def run(self, rows: list[StepScalars | None]) -> None:
        if self.regrouped:
            self.tensors[:, 1] = torch.tensor(self.row_of, device="cpu")
            self.regrouped = False
        cells = array("d")
        for row in rows:
            if row is None:
                cells.extend((0.0,) * self._width)
            else:
                cells.extend((row.factor, *row.h, row.weight)[: self._width])
        keys = self.random_keys(rows) if self.random else self.tensors
        gradients, _ = self.gradient_addresses.buffer_info()
        self.call(*self._fixed, gradients, cells.buffer_info()[0], keys.data_ptr(), self.chunks.threads())
        self.mark_written()
