"""What every backend's bucket does alike, and the few things that a backend says of itself."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.straight import check_constants, check_fields, constants_of
from ..precision.averaging import average_of, value_of, weight
from ..precision.codecs import read, write
from ..precision.random_bits import bits_of_elements, first_index, row_key, tensor_keys
from ..spec import AVERAGE, COUNT, Update
from ..util.hyperparameters import exact_number, plain_group
from ..util.layout import local, places
from ..util.on_device import OnDevice
from .gradient_norm import GradientStats, Norm, Scaling, exact_dtype, gradient_stats_from
from .key import Key, Piece
from .memory import Memory
from .slots import CPU, ParamSlot, StepGroup
from .step_scalars import StepScalars, one_kind, step_scalars_for


class Bucket(Memory):
    """Parameters that one backend updates together."""

    # Whether what all gradients are multiplied by, and whether the step is skipped, is read on the device.
    reads_stats: ClassVar[bool] = False
    launches_kernels: ClassVar[bool] = False  # whether a step may raise LaunchError

    def __init__(self, optimizer: Update, key: Key, slots: list[ParamSlot]) -> None:
        super().__init__(optimizer, key, slots)
        self.compute, self.random = key.compute, key.random
        self._hyperparameters = optimizer.hyperparameters
        self._reads_constants = bool(constants_of(key.variant.rule))
        # Whether it reads the stats itself. What comes before the rule can't be skipped there.
        self.takes_stats = self.reads_stats and not key.variant.staged
        self.stats: GradientStats | None = None  # in a step that has one
        self.rows: list[StepScalars | None] = []  # of this step, one a step group
        self._whole_numels: Tensor | None = None
        self.factors: dict[str, Tensor] = {}  # of this step: the scalars that differ from parameter to parameter
        self.pieces = self.cut(list(map(first_index, [m.p for m in slots])) if key.random else [0] * len(slots))
        if key.random:
            # A captured step forms the keys on the device; else that is done here, and nothing waits for the device.
            where = key.device if key.capturable else CPU
            indices = [self.indices[piece.slot] for piece in self.pieces]
            self._numbers_of_params = torch.tensor(indices, dtype=torch.int32, device=where)
            self._first_indices = torch.tensor([piece.first for piece in self.pieces], device=where)
        self._on_device: OnDevice | None = None  # where the step's numbers are read there
        self._form_step_groups([tuple(m.numbers.values()) for m in slots])

    # What a backend says.

    def cut(self, first: list[int]) -> list[Piece]:
        """The parameters, in the pieces that the backend runs them in.

        Args:
            first: of each parameter, the index of its first element here in the whole parameter.
        """
        return [Piece(i, 0, numel, k) for i, (numel, k) in enumerate(zip(self.numels, first, strict=True))]

    @classmethod
    def prepare(cls, optimizer: Update, key: Key, slots: list[ParamSlot]) -> Any:
        """Try the scalars, and compile what the bucket will need. A failure here changes nothing."""
        groups = [group for group in optimizer.param_groups if optimizer.running_variant(group) == key.variant]
        rows = [step_scalars_for(optimizer, group, 1, keep=key.differentiable) for group in groups]
        one_kind(rows, optimizer)
        check_fields(key.variant.rule, rows[0].h)

    @classmethod
    def warm_up(cls, optimizer: Update, key: Key, slots: list[ParamSlot]) -> None:
        """Compile what :meth:`prepare` leaves to the first step."""
        return

    @abstractmethod
    def run(self, rows: list[StepScalars | None]) -> None:
        """Update every parameter i whose ``gradients[i]`` is not None by the scalars ``rows[self.row_of[i]]``."""

    @classmethod
    @abstractmethod
    def launches(cls, optimizer: Update, key: Key, slots: list[ParamSlot]) -> int:
        """How many kernels, compiled calls or torch operations a step of such a bucket starts."""

    @classmethod
    def bytes_per_parameter(cls, optimizer: Update, key: Key) -> float:
        """Bytes read and written an element and step. At best every role is read and all but the gradient written."""
        param, kept = key.codecs[0], sum(codec.nbytes for codec in key.codecs)
        unread = param.dtypes[0].itemsize if param.name == "master" else 0
        return float(2 * kept - unread + key.gradient.itemsize)

    def partial_norms(self, norm: Norm) -> list[Tensor] | None:
        """Of the gradients of this step, by the tables that the bucket holds of them: see norms.partial_norms. None
        where it holds none.
        """
        return None

    def gradient_stats_from(self, partials: Tensor | None, scaling: Scaling, device: torch.device) -> GradientStats:
        """See gradient_norm.gradient_stats_from; asked of a bucket that takes the stats."""
        return gradient_stats_from(partials, scaling, device)

    def measure(self) -> Tensor:
        """What the variant's measure sums over each parameter, in the step whose rows were formed: ``(slots, sums)`` in
        the widest dtype of the device; 0 where there is no gradient.
        """
        raise NotImplementedError

    # Counting.

    def _form_step_groups(self, keys: list[Any]) -> None:
        """Sort the parameters by group and key; those of one step group have been counted alike."""
        members_of: dict[Any, list[int]] = {}
        for i, (m, key) in enumerate(zip(self.slots, keys, strict=True)):
            members_of.setdefault((m.group, key), []).append(i)
        numbers, groups = self._numbers(), self.optimizer.param_groups
        self.step_groups = [
            StepGroup(
                group,
                numbers[own[0]],
                self.optimizer.scalar_state_names(groups[group]),
                [self.slots[i] for i in own],
                own,
                self.key.capturable,
            )
            for (group, _), own in members_of.items()
        ]
        self.group_of = [0] * len(self.slots)
        for number, step_group in enumerate(self.step_groups):
            for i in step_group.places:
                self.group_of[i] = number
        # After a measure each parameter has scalars of its own.
        self.row_of = self.group_of if self.key.variant.measure is None else list(range(len(self.slots)))
        self._group_places: list[Tensor] = []
        self._all_active = [True] * len(self.step_groups)
        self.regrouped = True  # until the backend has taken note
        self._row_index: Tensor | None = None
        self.note_states()

    def _numbers(self) -> list[dict[str, Any]]:
        numbers = [m.numbers for m in self.slots]
        for step_group in getattr(self, "step_groups", ()):
            now = step_group.numbers()
            for i in step_group.places:
                numbers[i] = now
        return numbers

    def form_scalars(self) -> None:
        """Form the scalars of this step, a row for each step group; None where none has a gradient. Counts nothing."""
        if self._reads_constants:
            check_constants(self.key.variant.rule)
        active = self._all_active
        if not self.complete:
            present = self.present()
            if any(len({present[i] for i in step_group.places}) == 2 for step_group in self.step_groups):
                numbers = self._numbers()
                self._form_step_groups([(there, *n.values()) for n, there in zip(numbers, present, strict=True)])
            active = [present[step_group.places[0]] for step_group in self.step_groups]
        self.stats = rows = None
        self.factors = {}
        if self.key.capturable:
            self._on_device = self._hyperparameters.on_device(self.key.device)
            rows = self.rows_on_device(active, self._on_device)
        if rows is None:
            rows = [self._row(c) if there else None for c, there in zip(self.step_groups, active, strict=True)]
        self.rows = rows
        if len(rows) > 1:
            one_kind([row for row in self.rows if row is not None], self.optimizer)

    def places_of(self, step_group: int) -> Tensor:
        """Which of the parameters belong to a step group, on the device."""
        if not self._group_places:
            every = [torch.tensor(own.places, device="cpu") for own in self.step_groups]
            self._group_places = [places.to(self.key.device) for places in every]
        return self._group_places[step_group]

    @property
    def whole_numels(self) -> Tensor:
        """How many elements each parameter has for a rule, of a sharded one all; of a complex one both parts count."""
        if self._whole_numels is None:
            wide = exact_dtype(self.key.device)
            numels = torch.tensor([m.p.numel() * (1 + m.p.is_complex()) for m in self.slots], dtype=wide, device="cpu")
            self._whole_numels = numels.to(self.key.device)
        return self._whole_numels

    def take_factors(self, step_group: int, factors: dict[str, Tensor]) -> None:
        """Keep the scalars of the parameters of a step group: each ``(parameters,)``."""
        for name, values in factors.items():
            if len(self.step_groups) == 1:
                self.factors[name] = values
                continue
            into = self.factors.get(name)
            into = self._of_all(name, values) if into is None else into
            self.factors[name] = into.index_copy(0, self.places_of(step_group), values)

    def _of_all(self, name: str, like: Tensor) -> Tensor:
        """A scalar of every parameter, as the rows have it."""
        into = like.new_zeros(len(self.slots))
        for number, row in enumerate(self.rows):
            if row is not None:
                into = into.index_fill(0, self.places_of(number), getattr(row.h, name))
        return into

    def rows_to_run(self) -> list[StepScalars | None]:
        """The rows by which the step runs: ``row_of[i]`` is that of parameter i."""
        if self.key.variant.measure is None:
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
        """Have the gradients multiplied by the factor of the stats, and the step skipped where they say so."""
        if self.takes_stats:
            self.stats = stats.on(self.key.device)
            return
        here = stats.factor
        factor = here.item() if here.device.type == "cpu" else here.to(self.key.device)
        self.rows = [row and row._replace(factor=row.factor * factor) for row in self.rows]

    def rows_on_device(self, active: list[bool], on_device: OnDevice) -> list[StepScalars | None] | None:
        """The row of each step group that is active, as the device will form it; None where it can't."""
        return None

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
        """What was made on the host, on the device, without waiting for it."""
        return keys if keys.device == self.key.device else keys.pin_memory().to(self.key.device, non_blocking=True)

    def commit(self, skips: bool = False) -> None:
        """Count the step, unless it `skips` where the stats say so."""
        skip = None
        if skips and self.stats is not None and not all(row is not None and row.counted for row in self.rows):
            skip = self.stats.skip
        for step_group, row in zip(self.step_groups, self.rows, strict=True):
            if row is not None and row.counted:
                step_group.count(row.scalar_state)
            elif row is not None:
                step_group.advance(row.scalar_state, skip)
            elif self.key.variant.averaged:
                self._average_what_stays(step_group, skip)
        if not self.optimizer.step_is_tensor:
            self.note_states()

    def _average_what_stays(self, step_group: StepGroup, skip: Tensor | None) -> None:
        """Count parameters that have no gradient in this step into their averages, too."""
        group = plain_group(self.optimizer.param_groups[step_group.group])
        count = step_group.numbers(on_device=self.key.capturable)[COUNT]
        share = weight(group, count)
        for m in step_group.slots:
            codec = self.key.codecs[-1]
            average = [local(m.state[AVERAGE])]
            before = read(codec, average, local(m.p)).to(self.key.compute)
            value = value_of(m.state, m.p).to(self.key.compute)
            bits = self._bits_of_average(m, group, count, average[0]) if codec.random else None
            new = average_of(before, value, exact_number(share))
            new = new if skip is None else torch.where(skip != 0, before, new)
            write(codec, average, new, len(self.key.codecs), bits)
        step_group.count_average(skip)

    def _bits_of_average(self, m: ParamSlot, group: dict[str, Any], count: Any, average: Tensor) -> Tensor:
        """The random bits of an average of what stays. Its step is not counted, so that they are of the average's own
        count, and of a role that no rule has.
        """
        device = average.device
        key = row_key(int(group.get("seed", 0)), count if isinstance(count, Tensor) else int(count), device)
        number = torch.full((1,), m.index, dtype=torch.int32, device=device)
        first = torch.full((1,), first_index(m.p), device=device)
        return bits_of_elements(tensor_keys(key.view(1), number, first)[0], places(average))

    def counts_match(self) -> bool:
        """Whether nobody else has written the counts, which must lie where they did."""
        for step_group in self.step_groups:  # noqa: SIM110  a generator takes as long as what it asks
            if not step_group.untouched():
                return False
        return True
