"""Rows of scalars where the device counts the steps: one launch forms them and counts."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Hashable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...buckets.gradient_norm import GradientStats
from ...buckets.step_scalars import StepScalars, step_scalars_for, to_device
from ...kernels import rows as kernel
from ...spec import Update
from ...util.hyperparameters import PLAIN, plain_group
from ...util.on_device import OnDevice, capturing
from .launch import Launcher
from .recording import Recorder, Value, reads_its_arguments_alone
from .stats import Kind, TritonGradientStats, stats_constants, stats_types

if TYPE_CHECKING:
    from ...buckets.key import Key
    from ...buckets.step_groups import StepGroup

SLOTS = (64, 128, 256)  # values of a row, at most
_KINDS = {name: number for number, name in enumerate(kernel.KINDS)}
_READS = {torch.float32: "read32", torch.float64: "read64"}
_KEEPS = {torch.float32: kernel.KEPT32, torch.float64: kernel.KEPT64}
_ONE = (1.0).hex()


class Recording(NamedTuple):
    """How a row is formed."""

    h: Any  # the NamedTuple that scalars returned
    code: list[list[int]]  # of each value: its kind, what it is made of, where it goes
    sources: list[Hashable]  # of each, its bits, or the name of where it is read
    keeps: list[Hashable]  # of each, the name of where it is kept, 0 for nowhere

    @property
    def names(self) -> list[Hashable]:
        """Of all that is read and kept, in the order of the tables."""
        return [x for x in chain(self.sources, self.keeps) if not isinstance(x, int)]

    @property
    def kept(self) -> list[int]:
        """The indices of the values that are kept."""
        return [index for index, name in enumerate(self.keeps) if not isinstance(name, int)]


class Numbers(NamedTuple):
    """What the row of a step group is formed of."""

    fixed: dict[str, Any]  # the group, without what the device reads
    counted: dict[str, Any]  # the scalar states, where the host counts
    read: dict[str, Any]  # hyperparameters: the name and dtype of where each is read; of a tuple a list
    kept: dict[str, torch.dtype]  # what is counted on the device


def record(optimizer: Update, numbers: Numbers, averaged: bool) -> Recording | None:
    """How a row is formed; None where `scalars` does what cannot be recorded."""
    recorder = Recorder()
    dtypes: dict[Hashable, torch.dtype] = {}

    def symbol(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(symbol, value))
        dtypes[value[0]] = value[1]
        return recorder.read(value[0])

    recorder.note("constant", source=_ONE)  # the first, in which the kernel finds the passes
    hyper = {name: symbol(value) for name, value in numbers.read.items()}
    scalar_state = numbers.counted | {name: symbol((("kept", name), dtype)) for name, dtype in numbers.kept.items()}
    seed = hyper.pop("seed")
    before = scalar_state.pop("step")
    try:
        with recorder:
            step = before + 1
            row = step_scalars_for(optimizer, numbers.fixed, step, scalar_state, on_device=hyper)
        cells = [row.factor, *row.h, row.weight][: 1 + len(row.h) + averaged]
        goes: list[tuple[int, int, Hashable]] = [(recorder.number_of(x), cell, 0) for cell, x in enumerate(cells)]
        for name, dtype in numbers.kept.items():
            value = step if name == "step" else row.scalar_state[name]
            goes.append((recorder.number_of(value), _KEEPS[dtype], ("kept", name)))
        key = zip((*seed, step), (kernel.LOW, kernel.HIGH, kernel.STEP), strict=True)
        goes += [(recorder.number_of(x), cell, 0) for x, cell in key]
    except Exception:
        # Done again without a recorder, where it raises if it is wrong.
        return None
    return assembled(row.h, recorder.values, goes, dtypes)


def assembled(
    h: Any, values: list[Value], goes: list[tuple[int, int, Hashable]], dtypes: dict[Hashable, torch.dtype]
) -> Recording | None:
    """The values as the kernel has them; None of too many.

    Args:
        goes: an index among the values, where that goes, and the name of where it is kept.
        dtypes: of what is read, by name.
    """
    values = list(values)
    ends: dict[int, tuple[int, Hashable]] = {}
    for index, where, name in goes:
        if index in ends:  # a value goes to one cell; to the next goes a copy
            values.append(Value("mul", (index, 0)))
            index = len(values) - 1
        ends[index] = (where, name)
    if len(values) > SLOTS[-1]:
        return None
    code: list[list[int]] = []
    sources: list[Hashable] = []
    depth: list[int] = []
    for index, (kind, of, source) in enumerate(values):
        depth.append(1 + max((depth[x] for x in of), default=-1))
        if kind == "constant":
            sources.append(struct.unpack("q", struct.pack("d", float.fromhex(str(source))))[0])
        else:
            sources.append(source if kind == "read" else 0)
        kind = _READS[dtypes[source]] if kind == "read" else kind
        code.append([_KINDS[kind], *of, *[0] * (3 - len(of)), ends.get(index, (kernel.NOWHERE, 0))[0]])
    keeps = [ends.get(index, (kernel.NOWHERE, 0))[1] for index in range(len(values))]
    code[0][2] = max(depth)  # the passes
    return Recording(h, code, sources, keeps)


def numbers_of(group: dict[str, Any], step_group: StepGroup, held: OnDevice) -> Numbers:
    """What the row of a step group is formed of now."""
    read = held.names(step_group.group)
    for name, value in group.items():
        if isinstance(value, Tensor) and value.device == held.device and value.dtype in _READS and value.numel() == 1:
            read[name] = (("own", name), value.dtype)
    fixed = {name: value for name, value in group.items() if name not in read and name not in ("params", "param_names")}
    kept = {name: value.dtype for name, value in step_group.columns.items()}
    return Numbers(plain_group(fixed), step_group.unshared, read, kept)


def is_plain(value: Any) -> bool:
    """Whether a hyperparameter that is equal to another is no other, whatever was written into it."""
    fixed = type(value) in PLAIN or type(value) in (torch.dtype, torch.device)
    return fixed or (type(value) in (tuple, list) and all(map(is_plain, value)))


def has_tensor(value: Any) -> bool:
    """Whether there is a tensor among hyperparameters."""
    if isinstance(value, dict):
        return any(map(has_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(has_tensor, value)))


def address(name: Any, step_group: StepGroup, group: dict[str, Any], held: OnDevice) -> int:
    """Where the number of this name lies."""
    kind, which = name
    if kind == "hyper":
        return held.address(which)
    tensor: Tensor = step_group.columns[which] if kind == "kept" else group[which]
    return tensor.data_ptr()


def launcher_for(key: Key, width: int, slots: int, kept: int, stats: str, kind: Kind | None) -> Launcher:
    """What starts the kernel.

    Args:
        width: cells of a row.
        slots: values of a row, at most.
        kept: how many of them are kept.
        stats: "none", "read" or "form".
        kind: of triton_stats.kind_of, where it is formed.
    """
    forms = stats == "form"
    kind = kind or ("none", False, False, False)
    constants = {"WIDTH": width, "SLOTS": slots, "STATS": stats, "RANDOM": key.random, "KEPT": kept}
    constants |= stats_constants(kind)
    # The rows alone are few numbers, which a warp shuffles without shared memory.
    options = {"num_warps": 4 if forms else 1, "enable_fp_fusion": True}
    tables = (torch.int32, torch.int64, key.compute, torch.int32)
    return Launcher(kernel.form_rows, (*tables, *stats_types(kind)), constants | options, key.device)


class TritonRows:
    """Forms the rows of a bucket: the tables of kernels/rows.py, made anew where more than a value changed.

    Where `scalars` reads more than its arguments, be it the optimizer's attributes or a dict in a group, nobody can
    tell what changed: what it does is recorded in each step.
    """

    def __init__(self, optimizer: Update, key: Key) -> None:
        self._optimizer, self._key = optimizer, key
        self._numbers: list[Numbers | None] = []
        self._recordings: list[Recording | None] = []
        self._formulas: Any = None  # what was recorded
        self._are_pure = False  # whether they read their arguments alone
        self._are_known = False  # whether what was recorded is right while the numbers are the same
        self._laid: Any = None  # what is in the tables
        self._step_groups: list[StepGroup] = []
        self._seen: list[Any] = []
        self._rows: list[StepScalars | None] = []
        self._tables: tuple[Tensor, ...] = ()
        self._launchers: dict[Any, tuple[Launcher, tuple[Any, ...]]] = {}

    def rows(self, step_groups: list[StepGroup], active: list[bool], held: OnDevice) -> list[StepScalars | None] | None:
        """Make ready to form the rows of the active step groups; None where they cannot be formed so.

        Returns:
            Rows of which the type of ``h`` is all that is known here.
        """
        if not any(active):
            return [None] * len(step_groups)
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        # The same objects as in the last step, of which nothing but the values of numbers has changed. Of a group where
        # that can't be told `rebuilt` is another in every step.
        values = [optimizer.hyperparameters.values[c.group] for c in step_groups]
        kept = [t.data_ptr() for c in step_groups for t in c.columns.values()]
        formulas = (optimizer.scalars, optimizer.update_scalar_state)
        seen = [held.rebuilt, active, kept, [v.rebuilt for v in values], [c.unshared for c in step_groups], formulas]
        if self._are_known and step_groups is self._step_groups and seen == self._seen:
            return self._rows
        self._step_groups, self._seen = [], []
        numbers = [
            numbers_of(groups[c.group], c, held) if there else None
            for c, there in zip(step_groups, active, strict=True)
        ]
        if any(has_tensor(n.fixed) for n in numbers if n is not None):
            return None
        if formulas != self._formulas:
            self._formulas, self._numbers, self._recordings = formulas, [], []
            self._are_pure = all(map(reads_its_arguments_alone, formulas))
        fixed = [value for n in numbers if n is not None for value in n.fixed.values()]
        self._are_known = self._are_pure and all(map(is_plain, fixed))
        if numbers != self._numbers or not self._are_known:
            earlier = zip(self._numbers, self._recordings, strict=True) if self._are_known else ()
            known = [(n, r) for n, r in earlier if n is not None]
            averaged = self._key.variant.averaged
            self._recordings = [
                n and (next((r for old, r in known if old == n), None) or record(optimizer, n, averaged))
                for n in numbers
            ]
            self._numbers = numbers
        if any((n is None) != (r is None) for n, r in zip(numbers, self._recordings, strict=True)):
            return None
        addresses = [
            address(name, c, groups[c.group], held)
            for c, r in zip(step_groups, self._recordings, strict=True)
            for name in ([] if r is None else r.names)
        ]
        copies = [len(c.slots) for c in step_groups]
        laid = [None if r is None else r[1:] for r in self._recordings], addresses, copies
        if laid != self._laid:
            self._place(addresses, copies)
            self._laid = laid
        self._step_groups, self._seen = step_groups, seen
        self._rows = [None if r is None else StepScalars(None, r.h, {}, None, counted=True) for r in self._recordings]
        return self._rows

    def _place(self, addresses: list[int], copies: list[int]) -> None:
        """Bring the tables to the device."""
        if capturing(self._key.device):
            raise RuntimeError(
                "what the scalars are formed of changed since the last step, and can't be brought to the device while "
                "a graph is captured. Make a few steps first, on a side stream."
            )
        recordings = self._recordings
        slots = next(n for n in SLOTS if all(r is None or len(r.code) <= n for r in recordings))
        code, memory, following = array("i"), array("q"), iter(addresses)
        for r, count in zip(recordings, copies, strict=True):
            columns = [[0, 0, 0, 0, kernel.NOWHERE]] * slots
            written = [0] * slots
            sources = kept = [0] * slots
            if r is not None:
                first = [*r.code[0]]
                first[3] = count
                columns = [first, *r.code[1:], *columns[len(r.code) :]]
                written = r.kept + written[len(r.kept) :]
                sources = [x if isinstance(x, int) else next(following) for x in r.sources] + sources[len(r.code) :]
                kept = [x if isinstance(x, int) else next(following) for x in r.keeps] + kept[len(r.code) :]
            code.extend(chain(*zip(*columns, strict=True), written))
            memory.extend(sources + kept)
        device = self._key.device
        h = next(r.h for r in recordings if r is not None)
        width = 1 + len(h) + self._key.variant.averaged
        rows = torch.zeros(len(recordings), width, dtype=self._key.compute, device=device)
        keys = torch.zeros(len(recordings), dtype=torch.int32, device=device)
        self._tables = (to_device(code, torch.int32, device), to_device(memory, torch.int64, device), rows, keys)
        self._shape = (width, slots, max(len(r.kept) for r in recordings if r is not None))
        self._launchers = {}

    def form(self, stats: GradientStats | None) -> tuple[Tensor, Tensor]:
        """Form the rows and count the step, unless the stats say to skip it. Stats that were not formed yet are
        formed in the same launch.

        Returns:
            The table of rows, and int32 ``(rows,)``, what the random bits of each depend on.
        """
        code, memory, rows, keys = self._tables
        if isinstance(stats, TritonGradientStats) and not stats.is_formed:
            which: tuple[str, Kind | None] = ("form", stats.kind)
            given: tuple[Any, ...] = stats.arguments
            stats.is_formed = True
        else:  # what is not read is any table
            table = code if stats is None else stats.table()
            which, given = ("none" if stats is None else "read", None), (table, code, 0, code, code, code)
        if which not in self._launchers:
            launch = launcher_for(self._key, *self._shape, *which)
            self._launchers[which] = launch, launch.fixed(code, memory, rows, keys)
        launch, tables = self._launchers[which]
        launch(len(self._rows), *tables, *given)
        return rows, keys
