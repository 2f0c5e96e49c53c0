"""What every backend's bucket does alike: states, step counts, rows of scalars, and whether a step still fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.straight import check_constants, check_fields, constants_of
from ..precision.averaging import average_of, value_of, weight
from ..precision.codecs import part_names, read, write
from ..precision.random_bits import bits_of_elements, first_index, row_key, tensor_keys
from ..spec import AVERAGE, COUNT, Update
from ..util.gather import Gatherer, gatherer_of
from ..util.hyperparameters import exact_number, plain_group
from ..util.layout import (
    all_aligned,
    in_layout_of,
    is_sharded,
    is_wrapper,
    local,
    locals_of,
    places,
    same_layout,
    with_local,
)
from ..util.on_device import OnDevice
from .gradient_norm import Norm, Scaling, Signal, signal_from
from .key import Key, Piece
from .members import CPU, Cohort, Member
from .rows import Row, one_kind, row_for
from .state import State

# The check that torch.compile runs on its inputs: dtype, device, sizes and strides of all tensors in one call.
TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)

_END = object()


def addresses_of(tensors: list[Tensor | None]) -> array[int]:
    """Where each tensor lies; 0 for None."""
    try:
        return array("q", map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # one is None
        return array("q", [0 if t is None else t.data_ptr() for t in tensors])


def guards_of(tensors: list[Tensor]) -> Any:
    """What checks whether such tensors are of the same kind, dtype, device, sizes and strides; None of no tensors,
    of one twice, which it refuses, and where torch has no such check.
    """
    if TensorGuards is None or not tensors or len(set(map(id, tensors))) < len(tensors):
        return None
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def kinds_of(tensors: list[Tensor]) -> list[Any]:
    """The sizes, strides and dtype of each."""
    return [(t.shape, t.stride(), t.dtype) for t in tensors]


class Bucket(ABC):
    """Members that one backend updates together."""

    # Whether what all gradients are multiplied by, and whether the step is skipped, is read on the device.
    reads_signal: ClassVar[bool] = False
    keeps_layout: ClassVar[bool] = True  # gradients and states must lie in memory as their parameter does
    takes_memory: ClassVar[bool] = True  # what it is given must be ordinary tensors, with memory of their own
    takes_addresses: ClassVar[bool] = False  # of a gradient it needs to know only where it lies
    launches_kernels: ClassVar[bool] = False  # whether a step may raise LaunchError

    def __init__(self, optimizer: Update, key: Key, members: list[Member]) -> None:
        self.optimizer, self.key, self.members = optimizer, key, members
        self.compute, self.random = key.compute, key.random
        self._reads_constants = bool(constants_of(key.variant.rule))
        # Whether it reads the signal itself. A prologue before it can't be skipped there.
        self.takes_signal = self.reads_signal and not key.variant.prologue
        self.sharded = any(is_sharded(m.p) for m in members)
        values = [local(m.p).detach() for m in members]
        self.numels = [value.numel() for value in values]
        self.addresses = [value.data_ptr() for value in values]
        # Not the values themselves: who moves a parameter's data elsewhere wants this memory back.
        self._kinds = kinds_of(values)
        self._params = [m.p for m in members]
        self.gradients: list[Tensor | None] = []
        self.signal: Signal | None = None  # in a step that has one
        self.rows: list[Row | None] = []  # of this step
        self.complete = False  # every member has a gradient in this step
        self._indices = [m.index for m in members]
        self.pieces = self.cut(list(map(first_index, [m.p for m in members])) if key.random else [0] * len(members))
        if key.random:
            # A captured step forms the keys on the device; else that is done here, and nothing waits for the device.
            where = key.device if key.capturable else CPU
            indices = [self._indices[piece.member] for piece in self.pieces]
            self._numbers_of_params = torch.tensor(indices, dtype=torch.int32, device=where)
            self._first_indices = torch.tensor([piece.first for piece in self.pieces], device=where)
        self._on_device: OnDevice | None = None  # where the step's numbers are read there
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        self._all = self._indices == list(range(count))
        self._states: list[Tensor] = []  # the tensors among them, and as they were noted
        self._state_addresses: list[int] = []
        self._state_guards: Any = None
        self._state_kinds: list[Any] = []
        self._guards: Any = None
        self._examined = False  # whether gradients were found fit before
        self._gatherer: Gatherer | None = None
        self._gathered = False  # whether it found the gradients of this step
        self.place_states(values)
        self._form_cohorts([tuple(m.numbers.values()) for m in members])

    # What a backend says.

    def cut(self, first: list[int]) -> list[Piece]:
        """The members, in the pieces that the backend runs them in.

        Args:
            first: of each member, the index of its first element here in the whole parameter.
        """
        return [Piece(i, 0, numel, k) for i, (numel, k) in enumerate(zip(self.numels, first, strict=True))]

    @classmethod
    def prepare(cls, optimizer: Update, key: Key, members: list[Member]) -> Any:
        """Try the scalars, and compile what the bucket will need. A failure here changes nothing."""
        groups = [group for group in optimizer.param_groups if optimizer.running_variant(group) == key.variant]
        rows = [row_for(optimizer, group, 1, keep=key.differentiable) for group in groups]
        one_kind(rows, optimizer)
        check_fields(key.variant.rule, rows[0].h)

    @classmethod
    def warm_up(cls, optimizer: Update, key: Key, members: list[Member]) -> None:
        """Compile what :meth:`prepare` leaves to the first step."""
        return

    @abstractmethod
    def run(self, rows: list[Row | None]) -> None:
        """Update every member i whose ``gradients[i]`` is not None by the scalars ``rows[self.row_of[i]]``."""

    @classmethod
    @abstractmethod
    def launches(cls, optimizer: Update, key: Key, members: list[Member]) -> int:
        """How many kernels, compiled calls or torch operations a step of such a bucket starts."""

    @classmethod
    def bytes_per_parameter(cls, optimizer: Update, key: Key) -> float:
        """Bytes read and written an element and step. At best every role is read and all but the gradient written."""
        param, kept = key.codecs[0], sum(codec.nbytes for codec in key.codecs)
        unread = param.dtypes[0].itemsize if param.name == "master" else 0
        return float(2 * kept - unread + key.gradient.itemsize)

    def take_update(self, place: int, update: Tensor) -> None:
        """Put what a prologue made of a member's gradient in its place."""
        update = local(update).to(self.key.dtypes[1])
        if self.keeps_layout:
            update = in_layout_of(local(self.members[place].p), update)
        self.gradients[place] = update.clone() if self.key.aligned and update.data_ptr() % 16 else update

    def partial_norms(self, norm: Norm) -> list[Tensor] | None:
        """Of the gradients of this step, by the tables that the bucket holds of them: see norms.partial_norms. None
        where it holds none.
        """
        return None

    def signal_from(self, partials: Tensor | None, scaling: Scaling, device: torch.device) -> Signal:
        """See gradient_norm.signal_from; asked of a bucket that takes the signal."""
        return signal_from(partials, scaling, device)

    # States.

    def parts_of(self, m: Member) -> list[list[Tensor]]:
        """What a parameter and each of its states is kept as, in the rule's order: the parts, as they are here."""
        param, *kept = self.key.codecs
        own = [[local(m.p).detach(), *(m.state[name] for name in part_names(param, None))]]
        for name, codec in zip(self.key.variant.state_names, kept, strict=True):
            own.append([m.state[part] for part in (name, *part_names(codec, name))])
        return [list(map(local, parts)) for parts in own]

    def place_states(self, values: list[Tensor]) -> None:
        """Bring the states into the memory layout that the backend needs, for these (local) parameters."""
        if self.keeps_layout:
            param, *kept = self.key.codecs
            names = part_names(param, None)
            for name, codec in zip(self.key.variant.state_names, kept, strict=True):
                names += [] if codec.sharing else [name]
            for m, value in zip(self.members, values, strict=True):
                for name in names:
                    held = local(m.state[name])
                    if not same_layout(held, value):
                        m.state[name] = with_local(m.state[name], in_layout_of(value, held))

    # Counting.

    def _form_cohorts(self, keys: list[Any]) -> None:
        """Sort the members by group and key; those of one cohort have been counted alike."""
        members_of: dict[Any, list[int]] = {}
        for i, (m, key) in enumerate(zip(self.members, keys, strict=True)):
            members_of.setdefault((m.group, key), []).append(i)
        numbers, groups = self._numbers(), self.optimizer.param_groups
        self.cohorts = [
            Cohort(
                group,
                numbers[own[0]],
                self.optimizer.counted_names(groups[group]),
                [self.members[i] for i in own],
                own,
                self.key.capturable,
            )
            for (group, _), own in members_of.items()
        ]
        self.row_of = [0] * len(self.members)
        for row, cohort in enumerate(self.cohorts):
            for i in cohort.places:
                self.row_of[i] = row
        self.regrouped = True  # until the backend has taken note
        self._row_index: Tensor | None = None
        self._note_states()

    def _note_states(self) -> None:
        """Take note of the states as they are now: which they are, and where they lie."""
        # A dict of a user's own counts nothing.
        self._changes = State.changes if all(type(m.state) is State for m in self.members) else None
        self._state_dicts = [m.state for m in self.members]
        self._state_known = [*chain.from_iterable(map(dict.values, self._state_dicts)), _END]
        states = [v for v in self._state_known if isinstance(v, Tensor)]
        if list(map(id, states)) != list(map(id, self._states)):
            self._states = states
            here = self._states_here()
            self._state_guards, self._state_kinds = guards_of(here), kinds_of(here)
        self._state_addresses = list(map(Tensor.data_ptr, self._states_here()))
        if self._gatherer is not None:
            self._gatherer.watch(self._states)

    def _states_here(self) -> list[Tensor]:
        """The tensors among the states, of sharded ones the local parts."""
        return list(map(local, self._states)) if self.sharded else self._states

    def _numbers(self) -> list[dict[str, Any]]:
        numbers = [m.numbers for m in self.members]
        for cohort in getattr(self, "cohorts", ()):
            now = cohort.numbers()
            for i in cohort.places:
                numbers[i] = now
        return numbers

    def next_rows(self) -> None:
        """Form the scalars of this step, a row for each cohort; None where no member has a gradient. Counts nothing."""
        if self._reads_constants:
            check_constants(self.key.variant.rule)
        if self.complete:
            active = [True] * len(self.cohorts)
        else:
            present = self.present()
            if any(len({present[i] for i in cohort.places}) == 2 for cohort in self.cohorts):
                numbers = self._numbers()
                self._form_cohorts([(there, *n.values()) for n, there in zip(numbers, present, strict=True)])
            active = [present[cohort.places[0]] for cohort in self.cohorts]
        self._on_device = self.optimizer.hyperparameters.on_device(self.key.device) if self.key.capturable else None
        self.rows = self.form_rows(active)
        if len(self.rows) > 1:
            one_kind([row for row in self.rows if row is not None], self.optimizer)

    def form_rows(self, active: list[bool]) -> list[Row | None]:
        """The row of each cohort that is active."""
        return [self._row(c) if there else None for c, there in zip(self.cohorts, active, strict=True)]

    def _row(self, cohort: Cohort) -> Row:
        numbers = cohort.numbers(on_device=self.key.capturable)
        optimizer, keep = self.optimizer, self.key.differentiable
        group = optimizer.param_groups[cohort.group]
        step = numbers.pop("step") + 1
        on_device = self._on_device.group(cohort.group) if self._on_device is not None else {}
        values = None if keep else optimizer.hyperparameters.values[cohort.group].plain
        return row_for(optimizer, group, step, numbers, keep, on_device, values)

    def row_keys(self, rows: list[Row | None]) -> Tensor:
        """What the random bits of each row depend on in this step, int32."""
        device, groups = self._numbers_of_params.device, self.optimizer.param_groups
        own = []
        for cohort, row in zip(self.cohorts, rows, strict=True):
            seed: Any = int(groups[cohort.group].get("seed", 0))
            if self._on_device is not None:
                seed = self._on_device.group(cohort.group).get("seed", seed)
            own.append(row_key(seed, 0 if row is None else row.step, device))
        return torch.stack(own)

    def random_keys(self, rows: list[Row | None]) -> Tensor:
        """What the random bits of each piece depend on in this step: see random_bits.tensor_keys."""
        own = self.row_keys(rows)
        if self._row_index is None:
            self._row_index = torch.tensor([self.row_of[p.member] for p in self.pieces], device=own.device)
        keys = tensor_keys(own[self._row_index], self._numbers_of_params, self._first_indices)
        return self.brought(keys)

    def brought(self, keys: Tensor) -> Tensor:
        """What was made on the host, on the device, without waiting for it."""
        return keys if keys.device == self.key.device else keys.pin_memory().to(self.key.device, non_blocking=True)

    def commit(self, skips: bool = False) -> None:
        """Count the step, unless it `skips` where the signal says so."""
        skip = None
        if skips and self.signal is not None and not all(row is not None and row.counted for row in self.rows):
            skip = self.signal.tensor[1]
        for cohort, row in zip(self.cohorts, self.rows, strict=True):
            if row is not None and row.counted:
                cohort.count(row.carried)
            elif row is not None:
                cohort.advance(row.carried, skip)
            elif self.key.variant.averaged:
                self._average_what_stays(cohort, skip)
        if not self.optimizer.step_is_tensor:
            self._note_states()
        self.gradients = []

    def _average_what_stays(self, cohort: Cohort, skip: Tensor | None) -> None:
        """Count parameters that have no gradient in this step into their averages, too."""
        group = plain_group(self.optimizer.param_groups[cohort.group])
        count = cohort.numbers(on_device=self.key.capturable)[COUNT]
        share = weight(group, count)
        for m in cohort.members:
            codec = self.key.codecs[-1]
            average = [local(m.state[AVERAGE])]
            before = read(codec, average, local(m.p)).to(self.key.compute)
            value = value_of(m.state, m.p).to(self.key.compute)
            bits = self._bits_of_average(m, group, count, average[0]) if codec.random else None
            new = average_of(before, value, exact_number(share))
            new = new if skip is None else torch.where(skip != 0, before, new)
            write(codec, average, new, len(self.key.codecs), bits)
        cohort.count_average(skip)

    def _bits_of_average(self, m: Member, group: dict[str, Any], count: Any, average: Tensor) -> Tensor:
        """The random bits of an average of what stays. Its step is not counted, so that they are of the average's own
        count, and of a role that no rule has.
        """
        device = average.device
        key = row_key(int(group.get("seed", 0)), count if isinstance(count, Tensor) else int(count), device)
        number = torch.full((1,), m.index, dtype=torch.int32, device=device)
        first = torch.full((1,), first_index(m.p), device=device)
        return bits_of_elements(tensor_keys(key.view(1), number, first)[0], places(average))

    def mark_written(self) -> None:
        """Tell autograd of writes behind its back: a graph that saved a parameter must notice."""
        if self._gathered and self._gatherer is not None:
            self._gatherer.written()
            return
        written = self._values()
        if not self.complete:
            written = [p for p, g in zip(written, self.gradients, strict=True) if g is not None]
        torch.autograd.graph.increment_version(written)

    # Fitting.

    def fits(self, gradients: Sequence[Tensor | None] | Mapping[int, Tensor | None]) -> bool:
        """Whether the bucket can run with these (local) gradients; it keeps them for the step, laid out as needed."""
        values = self._values()
        if list(map(Tensor.data_ptr, values)) != self.addresses or not self._states_fit():
            return False
        own = gradients if self._all and isinstance(gradients, list) else [gradients[i] for i in self._indices]
        try:
            ready = self._guards is not None and self._guards.check(*values, *own)
        except TypeError:  # one is None
            ready = False
        self._gathered = False
        self.complete = ready or all(g is not None for g in own)
        return self._take(own) if ready else self._examine(values, own)

    def gather(self) -> bool:
        """Whether the bucket can run with the gradients that its parameters have now. It learns only where they lie.

        False says that :meth:`fits` must look at them.
        """
        found = self._gatherer
        self._gathered = (
            found is not None
            and self._states_are_held()
            and found.gather()
            and self._counts_fit()
            and self.accept_addresses(found.addresses, found.aligned)
        )
        self.complete = found is not None and found.complete
        return self._gathered

    def present(self) -> list[bool]:
        """Of each member, whether it has a gradient in this step."""
        if self._gathered and self._gatherer is not None:
            return [address != 0 for address in self._gatherer.addresses]
        return [g is not None for g in self.gradients]

    def note_gradients(self) -> None:
        """After a step with the gradients that the parameters have: make ready to gather those of the next."""
        if self.takes_addresses and not self.key.variant.prologue:
            self._gatherer = gatherer_of(self._params, self._states, self.key.dtypes[1]) or self._gatherer

    def _states_fit(self) -> bool:
        """Whether the states are those that were noted, in the memory that they had."""
        if not self._states_are_held():
            return False
        here = self._states_here()
        if list(map(Tensor.data_ptr, here)) != self._state_addresses or not self._counts_fit():
            return False
        # Under a dispatch mode, as a capture's tape is one, the guards know nothing again.
        return bool(self._state_guards and self._state_guards.check(*here)) or kinds_of(here) == self._state_kinds

    def _states_are_held(self) -> bool:
        """Whether the states hold the objects that were noted."""
        if self._changes != State.changes:
            changes = State.changes
            found = chain(chain.from_iterable(map(dict.values, self._state_dicts)), (_END,))
            if not all(map(is_, found, self._state_known)):
                return False
            self._changes = None if self._changes is None else changes
        return True

    def _counts_fit(self) -> bool:
        """Whether nobody else has written the counts, which must lie where they did."""
        for cohort in self.cohorts:  # noqa: SIM110  a generator takes as long as what it asks
            if not cohort.untouched():
                return False
        return True

    def _values(self) -> list[Tensor]:
        """The parameters, as they are here."""
        if not self.sharded:
            return self._params
        try:
            return locals_of(self._params)
        except AttributeError:  # some are ordinary tensors
            return list(map(local, self._params))

    def moved(self) -> list[int]:
        """The numbers of the parameters that lie elsewhere than when the bucket was made, or have other states."""
        states = self.optimizer.state
        return [
            m.index
            for m, address in zip(self.members, self.addresses, strict=True)
            if local(m.p).data_ptr() != address or (m.state and states.get(m.p) is not m.state)
        ]

    def _examine(self, values: list[Tensor], own: list[Tensor | None]) -> bool:
        as_they_are, laid_out = True, list(own)
        for i, (value, kind, g) in enumerate(zip(values, self._kinds, own, strict=True)):
            if (value.shape, value.stride(), value.dtype) != kind:
                return False
            if g is None:
                as_they_are = False
                continue
            if (
                is_sharded(g)
                or (self.takes_memory and is_wrapper(g))
                or g.layout != torch.strided
                or (g.dtype, g.device) != (self.key.dtypes[1], self.key.device)
            ):
                return False
            if g.shape != value.shape:
                return False
            plain = g.resolve_neg().resolve_conj()
            if self.keeps_layout and not same_layout(plain, value):
                plain = in_layout_of(value, plain)
            if plain is not g:
                laid_out[i] = plain
                as_they_are = False
        # A plan of one step, or one whose gradients are soon gathered, needs no guards.
        if as_they_are and self._examined:
            self._guards = guards_of([*values, *own])  # type: ignore[list-item]  # there are all
        self._examined = True
        return self._take(laid_out)

    def _take(self, gradients: list[Tensor | None]) -> bool:
        """Keep the gradients for the step."""
        self.gradients = gradients
        if not self.takes_memory:
            return True
        addresses = addresses_of(gradients)
        if not all(addresses) and any(g is not None and not at for g, at in zip(gradients, addresses, strict=True)):
            return False  # the memory of one was freed
        return self.key.variant.prologue or self._take_addresses(addresses)

    def accept(self, gradients: list[Tensor | None]) -> None:
        """Take what a prologue made of the gradients."""
        if self.takes_addresses:
            self._take_addresses(addresses_of(gradients))

    def _take_addresses(self, addresses: array[int]) -> bool:
        aligned = not self.key.aligned or all_aligned(addresses)
        return not self.takes_addresses or self.accept_addresses(addresses, aligned)

    def accept_addresses(self, addresses: array[int], aligned: bool) -> bool:
        """Make ready for gradients of a backend that takes addresses; it may refuse them.

        Args:
            addresses: where they lie; 0 for none.
            aligned: whether all are multiples of 16, if that matters.
        """
        raise NotImplementedError
