"""Parameters that one backend updates together: what all backends share, and the methods that each of them defines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..kernels.straight import check_constants, constants_of
from ..precision.random_bits import first_index, row_key, tensor_keys
from ..spec import Update
from ..util.on_device import OnDevice
from .averaging import average_what_stays
from .gradient_norm import GradientStats, Scaling, exact_dtype, gradient_stats_from
from .key import Key, pieces_of
from .memory import Memory
from .slots import CPU, ParamSlot
from .step_groups import StepGroup, place
from .step_scalars import StepScalars, one_kind, step_scalars_for


class DeviceRows(Protocol):
    """What makes the device form the rows of scalars."""

    def rows(
        self, step_groups: list[StepGroup], active: list[bool], on_device: OnDevice
    ) -> list[StepScalars | None] | None:
        """A row for each active step group, as the device will form it; None if it can't."""


class Bucket(Memory):
    """Parameters that one backend updates together.

    A backend has four methods: :meth:`compile`, :meth:`norms`, :meth:`measure` and :meth:`run`.

    Args:
        longest: elements of the longest piece that the backend runs a parameter in; None for whole parameters.
    """

    # Kernels on a device run it. A step may raise LaunchError; what lies at multiples of 16 is in a bucket of its own;
    # what all gradients are multiplied by, and whether the step is skipped, is read there.
    launches_kernels: ClassVar[bool] = False

    def __init__(self, optimizer: Update, key: Key, slots: list[ParamSlot], longest: int | None = None) -> None:
        super().__init__(optimizer, key, slots)
        self.random = key.random
        self._hyperparameters = optimizer.hyperparameters
        self._reads_constants = bool(constants_of(key.variant.rule))
        # Whether it reads the stats itself. What comes before the rule can't be skipped there.
        self.takes_stats = self.launches_kernels and not key.variant.staged
        self.stats: GradientStats | None = None  # in a step that has one
        self.rows: list[StepScalars | None] = []  # of this step, one a step group
        self.factors: dict[str, Tensor] = {}  # of this step: the scalars that differ from parameter to parameter
        first = list(map(first_index, [m.p for m in slots])) if key.random else [0] * len(slots)
        self.pieces = pieces_of(self.numels, first, longest, key.block_size or 1)
        if key.random:
            # A captured step forms the keys on the device; else that is done here, and nothing waits for the device.
            where = key.device if key.capturable else CPU
            indices = [self.indices[piece.slot] for piece in self.pieces]
            self._numbers_of_params = torch.tensor(indices, dtype=torch.int32, device=where)
            self._first_indices = torch.tensor([piece.first for piece in self.pieces], device=where)
        self._on_device: OnDevice | None = None  # where the step's numbers are read there
        self._device_rows: DeviceRows | None = None
        names = {
            group: optimizer.scalar_state_names(optimizer.param_groups[group]) for group in {m.group for m in slots}
        }
        self._columns = place(slots, [names[m.group] for m in slots], key.capturable)
        numbers = [m.numbers for m in slots]
        self._form_step_groups(numbers, [tuple(own.values()) for own in numbers])
        self.note_states()

    # The methods of a backend.

    @classmethod
    def compile(cls, optimizer: Update, key: Key, slots: list[ParamSlot], ahead: bool = False) -> Any:
        """Compile what the bucket will need, before there is one. A failure here changes nothing.

        Args:
            ahead: also what could wait for the first step that needs it.
        """
        return None

    @abstractmethod
    def run(self, rows: list[StepScalars | None]) -> None:
        """Update every parameter i whose ``gradients[i]`` is not None by the scalars ``rows[self.row_of[i]]``."""

    @cached_property
    def stretches(self) -> list[list[tuple[int, int, int]]]:
        """The stretches that can be updated one after another. Each lists (position, start, stop): the elements from
        start to stop, in the order of memory, of the parameter at that position. Here all parameters are one stretch.
        """
        return [[(position, 0, numel) for position, numel in enumerate(self.numels)]]

    def run_stretches(
        self, rows: list[StepScalars | None], before: Callable[[int], object], after: Callable[[int], object]
    ) -> None:
        """:meth:`run`, a stretch at a time; `before` and `after` are called with the number of each stretch."""
        before(0)
        self.run(rows)
        after(0)

    def norms(self) -> Tensor | None:
        """Sums of the squares of this step's gradients, from the bucket's own tables: see norms.partial_norms. None if
        the bucket has no such tables.
        """
        return None

    def gradient_stats_from(self, partials: Tensor | None, scaling: Scaling) -> GradientStats:
        """See gradient_norm.gradient_stats_from; on the bucket's device. Called only if :attr:`takes_stats`."""
        return gradient_stats_from(partials, scaling, self.key.device)

    def measure(self) -> Tensor:
        """The sums of the variant's measure over each parameter, after the rows were formed: ``(slots, sums)`` in the
        widest dtype of the device; 0 for a parameter without a gradient.
        """
        raise NotImplementedError

    # Counting.

    def _form_step_groups(self, numbers: list[dict[str, Any]], keys: list[Any]) -> None:
        """Sort the parameters into step groups: those of one group and key, whose steps were counted alike."""
        members_of: dict[Any, list[int]] = {}
        for i, (m, key) in enumerate(zip(self.slots, keys, strict=True)):
            members_of.setdefault((m.group, m.alone, key), []).append(i)
        groups = self.optimizer.param_groups
        self.step_groups = [
            StepGroup(
                group,
                numbers[own[0]],
                self.optimizer.scalar_state_names(groups[group]),
                [self.slots[i] for i in own],
                own,
            )
            for (group, *_), own in members_of.items()
        ]
        self.group_of = [0] * len(self.slots)
        for number, step_group in enumerate(self.step_groups):
            for i in step_group.positions:
                self.group_of[i] = number
        # After a measure each parameter has scalars of its own.
        self.row_of = list(range(len(self.slots))) if self.key.variant.measures else self.group_of
        self._group_positions: list[Tensor] = []
        self.regrouped = True  # until the backend has taken note
        self._row_index: Tensor | None = None
        # Of the others the bucket's columns have the numbers.
        self._counted_apart = [step_group for step_group in self.step_groups if step_group.columns]

    def _numbers(self) -> list[dict[str, Any]]:
        numbers: list[dict[str, Any]] = [{}] * len(self.slots)
        for step_group in self.step_groups:
            now = step_group.numbers()
            for i in step_group.positions:
                numbers[i] = now
        return numbers

    def form_scalars(self) -> None:
        """Form this step's row of scalars for each step group; None for a group without gradients. Counts nothing."""
        if self._reads_constants:
            check_constants(self.key.variant.rule)
        active = None  # all of them
        if not self.complete:
            present = self.present()
            if any(len({present[i] for i in step_group.positions}) == 2 for step_group in self.step_groups):
                numbers = self._numbers()
                keys = [(there, *own.values()) for own, there in zip(numbers, present, strict=True)]
                self._form_step_groups(numbers, keys)
                if self._counted_apart:
                    self.note_states()
            active = [present[step_group.positions[0]] for step_group in self.step_groups]
        self.stats = rows = None
        self.factors = {}
        if self.key.capturable:
            self._on_device = self._hyperparameters.on_device(self.key.device)
            if self._device_rows is not None:
                every = active or [True] * len(self.step_groups)
                rows = self._device_rows.rows(self.step_groups, every, self._on_device)
        if rows is None:
            rows = [self._row(c) if active is None or active[i] else None for i, c in enumerate(self.step_groups)]
        self.rows = rows
        if len(rows) > 1:
            one_kind([row for row in self.rows if row is not None], self.optimizer)

    def positions_of(self, step_group: int) -> Tensor:
        """The positions of the parameters of a step group, on the device."""
        if not self._group_positions:
            every = [torch.tensor(own.positions, device="cpu") for own in self.step_groups]
            self._group_positions = [positions.to(self.key.device) for positions in every]
        return self._group_positions[step_group]

    @cached_property
    def whole_numels(self) -> Tensor:
        """How many elements each whole parameter has, also a sharded one; a complex element counts as two."""
        wide = exact_dtype(self.key.device)
        numels = torch.tensor([m.p.numel() * (1 + m.p.is_complex()) for m in self.slots], dtype=wide, device="cpu")
        return numels.to(self.key.device)

    def rows_to_run(self) -> list[StepScalars | None]:
        """The rows by which the step runs: ``row_of[i]`` is that of parameter i."""
        if not self.key.variant.measures:
            return self.rows
        own = [self.rows[number] for number in self.group_of]
        if not self.factors:
            return own
        # A device is not asked: as tensors they are read there.
        here = self.key.device == CPU and not self.key.differentiable
        values: list[Any] = [t.tolist() if here else t.unbind() for t in self.factors.values()]
        return [
            row and row._replace(h=row.h._replace(**dict(zip(self.factors, of_one, strict=True))))
            for row, of_one in zip(own, zip(*values, strict=True), strict=True)
        ]

    def scale(self, stats: GradientStats) -> None:
        """Multiply the gradients by the factor of the stats, and skip the step if they say so."""
        if self.takes_stats:
            self.stats = stats.on(self.key.device)
            return
        here = stats.factor
        factor = here.item() if here.is_cpu else here.to(self.key.device)
        self.rows = [row and row._replace(factor=row.factor * factor) for row in self.rows]

    def _row(self, step_group: StepGroup) -> StepScalars:
        numbers = step_group.numbers(on_device=self._on_device is not None)
        optimizer, keep, number = self.optimizer, self.key.differentiable, step_group.group
        group = optimizer.param_groups[number]
        step = numbers.pop("step") + 1
        on_device = None if self._on_device is None else self._on_device.group(number)
        values = None if keep else self._hyperparameters.values[number].plain
        return step_scalars_for(optimizer, group, step, numbers, keep, on_device, values)

    def row_keys(self) -> Tensor:
        """What the random bits of each row depend on in this step, int32."""
        device, groups = self._numbers_of_params.device, self.optimizer.param_groups
        own = []
        for step_group, row in zip(self.step_groups, self.rows, strict=True):
            seed: Any = int(groups[step_group.group].get("seed", 0))
            if self._on_device is not None:
                seed = self._on_device.group(step_group.group).get("seed", seed)
            own.append(row_key(seed, 0 if row is None else row.step, device))
        keys = torch.stack(own)
        return keys if self.row_of is self.group_of else keys[torch.tensor(self.group_of, device="cpu").to(device)]

    def random_keys(self) -> Tensor:
        """What the random bits of each piece depend on in this step: see random_bits.tensor_keys."""
        own = self.row_keys()
        if self._row_index is None:
            self._row_index = torch.tensor([self.row_of[p.slot] for p in self.pieces], device=own.device)
        keys = tensor_keys(own[self._row_index], self._numbers_of_params, self._first_indices)
        return self.to_device_async(keys)

    def to_device_async(self, keys: Tensor) -> Tensor:
        """Copy what was made on the host to the device, without waiting for the copy."""
        return keys if keys.device == self.key.device else keys.pin_memory().to(self.key.device, non_blocking=True)

    def commit(self, skips: bool = False) -> None:
        """Count the step, unless it `skips` where the stats say so."""
        skip = None
        for i, row in enumerate(self.rows):
            step_group = self.step_groups[i]
            if row is not None and row.counted:
                step_group.count(row.scalar_state)
                continue
            if skips and self.stats is not None and skip is None:
                skip = self.stats.skip
            if row is not None:
                step_group.advance(row.scalar_state, skip)
            elif self.key.variant.averaged:
                average_what_stays(self.optimizer, self.key, step_group, skip)
        if not self.optimizer.step_is_tensor:
            self.note_states()

    def counts_match(self) -> bool:
        """Whether nobody else has written the counts, which must lie where they did."""
        for column in self._columns:
            if not column.untouched():
                return False
        for step_group in self._counted_apart:  # noqa: SIM110  a generator takes as long as what it asks
            if not step_group.untouched():
                return False
        return True
