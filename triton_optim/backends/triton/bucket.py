"""The Triton backend: one launch of one kernel updates every parameter of a bucket."""

from __future__ import annotations

import math
from array import array
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...buckets.bucket import Bucket
from ...buckets.gradient_norm import EUCLIDEAN, GradientStats, Scaling, scaling_of
from ...buckets.key import Key
from ...buckets.slots import ParamSlot
from ...buckets.step_scalars import StepScalars, plain_cells, step_scalars_for, table_of
from ...dispatch import this_machine
from ...kernels import multi_tensor as kernel
from ...precision.random_bits import host_row_key, tensor_numbers
from ...spec import Update
from ...util.on_device import capturing
from .launch import Launcher, warp_size
from .measure import MeasurePass, measure_launchers
from .norm import NormPass, norm_launcher
from .rows import SLOTS, TritonRows
from .rows import launcher_for as launcher_of_rows
from .staging import Staging
from .stats import TritonGradientStats, kind_of, rows_on, stats_launcher
from .tables import TRITON_DTYPES, chunk_table, kept_as


def launcher_for(key: Key, scalars: Any, stats: bool, by_value: bool) -> Launcher:
    """What starts the kernel for a bucket.

    Args:
        scalars: the NamedTuple type of the rule's scalars.
        stats: whether the step has one.
        by_value: whether the kernel takes the only row as an argument, and not a table of rows.
    """
    rule, averaged = key.variant.rule, key.variant.averaged
    constants = {
        "RULE": rule,
        # In a constexpr: of a NamedTuple class itself Triton 3.6 to 3.9 make no cache key.
        "SCALARS": tl.constexpr(scalars),
        "FIELDS": scalars._fields,
        "STATS": stats,
        "BY_VALUE": by_value,
        "COMPUTE": TRITON_DTYPES[key.compute],
        "CONVERT": kernel.convert_nearest if this_machine().interpreter else kernel.convert,
        "BLOCK": kernel.BLOCK,
        "ALIGNED": key.aligned,
        "SOURCE": getattr(rule, "cache_key", ""),  # the interpreter has none
        **kept_as(key.codecs, key.gradient, warp_size(key.device), averaged=averaged),
    }
    rows: Any = (0.5,) * (1 + len(scalars._fields) + averaged) if by_value else key.compute
    keys: Any = 0 if by_value and key.random else torch.int32
    tables = (torch.int32, torch.int64, torch.int64, rows, torch.int32, keys, torch.float64 if stats else torch.int32)
    return Launcher(kernel.multi_tensor, tables, constants, key.device)


class TritonBucket(Bucket):
    """Holds the kernel's tables on the device: chunks and tensors, made once; gradients and rows, refreshed."""

    takes_addresses = True
    launches_kernels = True

    def __init__(self, optimizer: Update, key: Key, slots: list[ParamSlot]) -> None:
        super().__init__(optimizer, key, slots)
        self.chunks = chunk_table(self.numels, key.device)
        self._programs = len(self.chunks)
        self._by_value = takes_by_value(key)
        addresses = [[part.data_ptr() for parts in self.parts_of(m) for part in parts] for m in slots]
        own = zip(self.numels, addresses, strict=True)
        self.tensors = torch.tensor([[numel, 0, *a] for numel, a in own], device="cpu").to(key.device)
        # Where the gradients lie, in memory that is kept: for a new array malloc would first merge all small chunks
        # that were freed since the last, the old gradients among them, which takes longer than to find new ones.
        self.pointers = array("q", bytes(8 * len(slots)))
        self._gradients = Staging(len(slots), torch.int64, key.device)
        self.gradient_table = self._gradients.tensor
        self.numbers = self.chunks  # not read
        if key.random:
            first = torch.tensor([piece.first for piece in self.pieces], device="cpu")
            numbers = torch.tensor([m.index for m in slots], dtype=torch.int32, device="cpu")
            self.numbers = tensor_numbers(first, numbers).to(key.device)
        self._launchers: dict[Any, Launcher] = {}
        self._row_table: Staging | None = None
        self._norm_pass: NormPass | None = None
        self._stats_rows = rows_on(key.device)
        self._measure_pass: MeasurePass | None = None
        self._own_table: Tensor | None = None  # of a step that was measured: a row for each parameter
        self._groups_here: Tensor | None = None
        self._rows = TritonRows(optimizer, key)
        self._device_rows = None if key.variant.staged else self._rows
        # Nothing can be pinned while a graph is captured, and what was captured must not be freed.
        self._staging: Tensor | None = None
        self._captured: list[Tensor] = []

    @classmethod
    def compile(cls, optimizer: Update, key: Key, slots: list[ParamSlot], ahead: bool = False) -> Any:
        if not ahead:
            scaling = scaling_of(optimizer)
            for launcher in cls._first_launchers(optimizer, key, slots, [] if scaling is None else [scaling]):
                launcher.load()
            return
        one, norm = torch.empty(0, device="cpu"), optimizer.max_grad_norm
        scalings = [Scaling(max_norm=norm)] if norm is not None else []
        if optimizer.amp is not None:  # told of infinities, or looking for them
            scalings += [Scaling(one, one, True, norm), Scaling(one, None, True, norm)]
        for launcher in cls._first_launchers(optimizer, key, slots, scalings):
            launcher.compile()

    @classmethod
    def _first_launchers(
        cls, optimizer: Update, key: Key, slots: list[ParamSlot], scalings: list[Scaling]
    ) -> list[Launcher]:
        """What the first step will start, in this order.

        Args:
            scalings: what it may do with all gradients.
        """
        group = next(group for group in optimizer.param_groups if optimizer.running_variant(group) == key.variant)
        row, averaged, staged = step_scalars_for(optimizer, group, 1), key.variant.averaged, key.variant.staged
        scalars: Any = type(row.h)
        step_groups = len({(m.group, *m.numbers.values()) for m in slots})
        by_value = takes_by_value(key) and step_groups == 1 and plain_cells(row, averaged) is not None
        own = launcher_for(key, scalars, bool(scalings) and not staged, by_value)
        kept = len(optimizer.scalar_state_names(group))
        before = launchers_before(key, 1 + len(row.h) + averaged, kept, scalings)
        measures = [] if key.variant.measure is None else measure_launchers(key, scalars)
        return [*before, *measures, own]

    def gradient_stats_from(self, partials: Tensor | None, scaling: Scaling) -> GradientStats:
        on_device = self._hyperparameters.on_device(self.key.device) if self.key.capturable else None
        limit = limit_on(self.key.device, scaling.max_norm) if on_device is None else on_device.max_norm
        return TritonGradientStats(partials, scaling, limit, self._stats_rows)

    def _take_addresses(self, addresses: array[int], aligned: bool) -> bool:
        if addresses != self.pointers:
            if not super()._take_addresses(addresses, aligned):
                return False
            self.pointers[:] = addresses
            if capturing(self.key.device):
                self._take_captured()
            else:
                self._gradients.push(self.pointers)
                self.gradient_table = self._gradients.tensor
                if self.key.capturable and self._staging is None and self.key.device.type != "cpu":
                    self._staging = torch.empty(len(addresses), dtype=torch.int64, device="cpu", pin_memory=True)
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

    def norms(self) -> Tensor | None:
        if self.key.variant.prologue:  # the gradients are not in the table yet
            return None
        if self._norm_pass is None:
            tables = (self.chunks, self.tensors)
            self._norm_pass = NormPass(*tables, self.key.gradient, self.key.aligned, EUCLIDEAN)
        return self._norm_pass(self.gradient_table)

    def run(self, rows: list[StepScalars | None]) -> None:
        self._place_rows()
        averaged = self.key.variant.averaged
        some = rows[0] if len(rows) == 1 else next(row for row in rows if row is not None)
        assert some is not None
        only = some if self._by_value and len(rows) == 1 else None
        cells = None
        if only is not None and type(only.step) is int:  # else the device counts
            cells = plain_cells(only, averaged)
        table: Any = cells
        keys: Any = self.chunks  # not read
        if only is not None and cells is not None:
            keys = host_row_key(self._seed(0), only.step) if self.random else keys
        elif some.counted:  # all are
            table, keys = self._rows.form(self.stats)
        else:
            table = self._table_of(self.rows) if self._own_table is None else self._own_table
            keys = self.to_device_async(self.row_keys()) if self.random else keys
        self._own_table = None
        compiled_for = (type(some.h), self.stats is not None, cells is not None)
        launch = self._launchers.get(compiled_for)
        if launch is None:
            launch = self._launchers[compiled_for] = launcher_for(self.key, *compiled_for)
        stats = self.chunks if self.stats is None else self.stats.table()
        launch(self._programs, self.chunks, self.tensors, self.gradient_table, table, self.numbers, keys, stats)
        self.mark_written()

    def measure(self) -> Tensor:
        self._place_rows()
        if self._measure_pass is None:
            self._measure_pass = MeasurePass(self.key, self.chunks, self.tensors, self.numels)
        some = next(row for row in self.rows if row is not None)
        self._own_table = self._table_of_each()
        return self._measure_pass(type(some.h), self.gradient_table, self._own_table)

    def _table_of_each(self) -> Tensor:
        """A row for each parameter."""
        table = self._table_of(self.rows)
        return table.expand(len(self.slots), -1).clone() if len(table) == 1 else table[self._groups()]

    def rows_to_run(self) -> list[StepScalars | None]:
        fields = next(row.h._fields for row in self.rows if row is not None)
        if self.key.variant.sampled is not None:
            self._own_table = self._table_of_each()
        for name, values in self.factors.items():
            assert self._own_table is not None
            self._own_table[:, 1 + fields.index(name)] = values
        return self.rows

    def _groups(self) -> Tensor:
        """The step group of each parameter, on the device."""
        if self._groups_here is None:
            self._groups_here = torch.tensor(self.group_of, device="cpu").to(self.key.device)
        return self._groups_here

    def _place_rows(self) -> None:
        """Tell the kernels which parameter has which row."""
        if self.regrouped:
            self.tensors[:, kernel.ROW] = torch.tensor(self.row_of, device="cpu").to(self.key.device)
            self.regrouped, self._groups_here = False, None

    def _table_of(self, rows: list[StepScalars | None]) -> Tensor:
        """The rows as a table on the device."""
        width = 1 + len(next(row.h for row in rows if row is not None)) + self.key.variant.averaged
        cells = [None if row is None else plain_cells(row, self.key.variant.averaged) for row in rows]
        if any(c is None and row is not None for c, row in zip(cells, rows, strict=True)):
            return table_of(rows, self.key.compute, self.key.device, self.key.variant.averaged)
        if self._row_table is None:  # with room for all rows that there may be: how many there are may differ each step
            self._row_table = Staging(width * len(self.slots), self.key.compute, self.key.device)
        nothing = (0.0,) * width
        code = "d" if self.key.compute == torch.float64 else "f"
        self._row_table.push(array(code, chain.from_iterable(nothing if c is None else c for c in cells)))
        return self._row_table.tensor[: width * len(rows)].view(-1, width)

    def _seed(self, step_group: int) -> int:
        return int(self.optimizer.param_groups[self.step_groups[step_group].group].get("seed", 0))


@lru_cache(maxsize=64)
def limit_on(device: torch.device, max_norm: float | None) -> Tensor:
    """The largest norm allowed, infinite for any, on the device."""
    return torch.full((1,), math.inf if max_norm is None else max_norm, dtype=torch.float64, device=device)


def launchers_before(key: Key, width: int, kept: int, scalings: list[Scaling]) -> list[Launcher]:
    """What a step starts before the update.

    Args:
        width: cells of a row.
        kept: numbers that a row's parameters keep, such as ``step``.
        scalings: what it may do with all gradients.
    """
    found = []
    if any(scaling.needs_norm for scaling in scalings):
        found.append(norm_launcher(key.gradient, EUCLIDEAN.kind, key.aligned, key.device))
    rows = key.capturable and not key.variant.staged
    kinds = [] if key.variant.staged else list(dict.fromkeys(map(kind_of, scalings)))
    if rows:
        asked: list[Any] = [("form", kind) for kind in kinds] or [("none", None)]
        found += [launcher_of_rows(key, width, SLOTS[0], kept, *stats) for stats in asked]
    else:
        found += [stats_launcher(kind, key.device) for kind in kinds]
    return found


def takes_by_value(key: Key) -> bool:
    """Whether the kernel may take its only row as an argument: float numbers are handed over in 32 bits, and captured
    steps read theirs on the device.
    """
    one = not key.variant.measures  # else each parameter has a row
    return one and key.compute == torch.float32 and (key.variant.prologue or not key.capturable)
