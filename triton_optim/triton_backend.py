"""The Triton backend: one launch of one kernel updates every member of a bucket."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from .bucket import Bucket, Key
from .codecs import Codec, plain
from .dispatch import this_machine
from .gradient_norm import Norm, Scaling
from .kernels import multi_tensor as kernel
from .members import Member
from .on_device import capturing
from .random_bits import tensor_numbers
from .rows import Row, row_for, table_of, to_device
from .triton_launch import compile_ahead, launch, warp_size
from .triton_rows import TritonRows

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def kept_as(
    codecs: tuple[Codec, ...],
    gradient: torch.dtype,
    warp_size: int,
    module: ModuleType = kernel,
    averaged: bool = False,
) -> dict[str, Any]:
    """What the kernel is told of how the roles are kept, and the launch options that follow.

    Args:
        codecs: of the parameter and the states.
        gradient: its dtype.
        warp_size: threads a warp.
        module: of the kernel.
        averaged: whether the last role is the average of the parameter.
    """
    roles = [codecs[0], plain(gradient), *codecs[1:]]
    parts = [part for codec in roles for part in zip(codec.dtypes, codec.each, strict=True)]
    sharing = max(codec.sharing for codec in codecs)
    return {
        "CODECS": tuple(codec.name for codec in roles),
        "DTYPES": tuple(TRITON_DTYPES[dtype] for dtype, _ in parts),
        "EACH": tuple(each for _, each in parts),
        "FIRST": (0, *accumulate(len(codec.dtypes) for codec in roles)),
        "AVERAGED": averaged,
        "RANDOM": any(codec.random for codec in codecs),
        "SHARING": sharing,
        **module.launch_options([dtype.itemsize for dtype, each in parts if each == 1], sharing, warp_size),
    }


def chunk_table(numels: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``(chunks, 2)``: the tensor and the chunk in it, of tensors of so many elements."""
    chunks = -(-torch.tensor(numels, dtype=torch.int64) // kernel.BLOCK)
    tensor = torch.repeat_interleave(torch.arange(len(numels)), chunks)
    first = torch.repeat_interleave(chunks.cumsum(0) - chunks, chunks)
    chunk = torch.arange(len(tensor)) - first
    return torch.stack((tensor, chunk), dim=1).to(torch.int32).to(device)


def constants_of(key: Key, scalars: Any, signal: bool) -> dict[str, Any]:
    """What the kernel is compiled for.

    Args:
        scalars: the NamedTuple type of the rule's scalars.
        signal: whether the step has one.
    """
    return {
        "RULE": key.variant.rule,
        # In a constexpr: of a NamedTuple class itself Triton 3.6 to 3.9 make no cache key.
        "SCALARS": tl.constexpr(scalars),
        "FIELDS": scalars._fields,
        "SIGNAL": signal,
        "COMPUTE": TRITON_DTYPES[key.compute],
        "CONVERT": kernel.convert_nearest if this_machine().interpreter else kernel.convert,
        "BLOCK": kernel.BLOCK,
        "ALIGNED": key.aligned,
        **kept_as(key.codecs, key.gradient, warp_size(key.device), averaged=key.variant.averaged),
    }


class TritonBucket(Bucket):
    """Holds the kernel's tables on the device: chunks and tensors, made once; gradients and rows, refreshed."""

    reads_signal = True
    takes_addresses = True

    def __init__(self, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> None:
        super().__init__(optimizer, key, members)
        self.chunks = chunk_table(self.numels, key.device)
        addresses = [[part.data_ptr() for parts in self.parts_of(m) for part in parts] for m in members]
        own = zip(self.numels, addresses, strict=True)
        self.tensors = torch.tensor([[numel, 0, *a] for numel, a in own]).to(key.device)
        # Where the gradients lie, in memory that is kept: for a new array malloc would first merge all small chunks
        # that were freed since the last, the old gradients among them, which takes longer than to find new ones.
        self.pointers = array("q", bytes(8 * len(members)))
        self.gradient_table = to_device(self.pointers, torch.int64, key.device)
        self.numbers = self.chunks  # not read
        if key.random:
            first = torch.tensor([piece.first for piece in self.pieces])
            numbers = torch.tensor([m.index for m in members], dtype=torch.int32)
            self.numbers = tensor_numbers(first, numbers).to(key.device)
        self._constants: dict[Any, dict[str, Any]] = {}
        self._rows_on_device = TritonRows(optimizer, key)
        # Nothing can be pinned while a graph is captured, and what was captured must not be freed.
        self._staging: Tensor | None = None
        self._captured: list[Tensor] = []

    @classmethod
    def launches(cls, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> int:
        return 1

    @classmethod
    def warm_up(cls, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> None:
        super().warm_up(optimizer, key, members)
        group = next(group for group in optimizer.param_groups if optimizer.running_variant(group) == key.variant)
        scalars = type(row_for(optimizer, group, 1).h)
        signal = optimizer.scales_gradients and not key.variant.prologue
        last = torch.float64 if signal else key.compute
        tables = (torch.int32, torch.int64, torch.int64, key.compute, torch.int32, torch.int32, last)
        compile_ahead(kernel.multi_tensor, tables, constants_of(key, scalars, signal), key.device)
        if key.capturable and not key.variant.prologue:
            TritonRows.warm_up(key, 1 + len(scalars._fields) + key.variant.averaged, signal)
        if signal:
            from .triton_norm import step_signal

            zeros, one = torch.zeros(1, 2, dtype=torch.float64, device=key.device), torch.ones((), device=key.device)
            norm = optimizer.max_grad_norm
            kinds = [Scaling(max_norm=norm)] if norm is not None else []
            if optimizer.amp is not None:  # told of infinities, and looking for them
                kinds += [Scaling(one, one, True, norm), Scaling(one, None, True, norm)]
            for scaling in kinds:
                step_signal(zeros if scaling.reads else None, scaling, torch.ones_like(zeros[:, 0]))

    def signal_from(self, partials: Tensor | None, scaling: Scaling, device: torch.device) -> Tensor:
        from .triton_norm import step_signal

        return step_signal(partials, scaling, self.optimizer.on_device(device).max_norm)

    def accept_addresses(self, addresses: array[int], aligned: bool) -> bool:
        if addresses != self.pointers:
            if self.key.aligned and not aligned:
                return False
            self.pointers[:] = addresses
            if capturing(self.key.device):
                self._take_captured()
            else:
                self.gradient_table = to_device(self.pointers, torch.int64, self.key.device)
                if self.key.capturable and self._staging is None and self.key.device.type != "cpu":
                    self._staging = torch.empty(len(addresses), dtype=torch.int64, pin_memory=True)
        return True

    def _take_captured(self) -> None:
        """Let the graph copy the addresses from memory that outlives it."""
        if self._staging is None:
            raise RuntimeError("no step was made before the one that is captured. Make a few first, on a side stream.")
        self._staging.copy_(torch.frombuffer(self.pointers, dtype=torch.int64))
        self.gradient_table = torch.empty_like(self._staging, device=self.key.device)
        self.gradient_table.copy_(self._staging, non_blocking=True)
        self._captured += [self._staging, self.gradient_table]
        self._staging = None

    def form_rows(self, active: list[bool]) -> list[Row | None]:
        if self._on_device is not None and not self.key.variant.prologue:
            rows = self._rows_on_device.rows(self.cohorts, active, self._on_device)
            if rows is not None:
                return rows
        return super().form_rows(active)

    def partial_norms(self, norm: Norm) -> list[Tensor]:
        if self.key.variant.prologue:  # the gradients are not in the table yet
            return super().partial_norms(norm)
        from .triton_norm import launch_partial_norms

        return [
            launch_partial_norms(
                self.chunks, self.tensors, self.gradient_table, self.key.gradient, self.key.aligned, norm
            )
        ]

    def run(self, rows: list[Row | None]) -> None:
        if self.regrouped:
            self.tensors[:, kernel.ROW] = torch.tensor(self.row_of).to(self.key.device)
            self.regrouped = False
        h = next(row.h for row in rows if row is not None)
        compiled_for = (type(h), self.signal is not None)
        if compiled_for not in self._constants:
            self._constants[compiled_for] = constants_of(self.key, *compiled_for)
        constants = self._constants[compiled_for]
        if any(row is not None and row.counted for row in rows):
            table, keys = self._rows_on_device.form(self.signal)
        else:
            table = table_of(rows, self.key.compute, self.key.device, self.key.variant.averaged)
            keys = self.brought(self.row_keys(rows)) if self.key.random else self.chunks
        signal = table if self.signal is None else self.signal
        tables = (self.chunks, self.tensors, self.gradient_table, table, self.numbers, keys, signal)
        launch(kernel.multi_tensor, len(self.chunks), tables, constants)
        self.mark_written()
