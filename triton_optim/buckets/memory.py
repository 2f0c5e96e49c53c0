"""Where the parameters, states and gradients of a bucket lie, and whether a step finds them there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..precision.codecs import part_names
from ..spec import Update
from ..util.gather import Gatherer, gatherer_of
from ..util.layout import all_aligned, in_layout_of, is_sharded, is_wrapper, local, locals_of, same_layout, with_local
from .key import Key
from .slots import ParamSlot
from .state import WatchedState

# The check that torch.compile runs on its inputs: dtype, device, sizes and strides of all tensors in one call.
TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)

_END = object()


def addresses_of(tensors: list[Tensor | None]) -> array[int]:
    """The address of each tensor; 0 for None."""
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


def gradients_fit(values: list[Tensor], own: list[Tensor | None], wanted: tuple[Any, ...], ordinary: bool) -> bool:
    """Whether each gradient is of its parameter's shape and of the dtype, device and layout that are wanted; and of no
    class with operations of its own, if they must be `ordinary`.
    """
    for value, g in zip(values, own, strict=True):
        if g is None:
            continue
        if is_sharded(g) or (ordinary and is_wrapper(g)):
            return False
        if (g.dtype, g.device, g.layout) != wanted or g.shape != value.shape:
            return False
    return True


class Memory(ABC):
    """Where parameters, their states and the gradients of a step lie."""

    # Compiled code runs it: gradients and states must be ordinary tensors that lie in memory as their parameter does.
    takes_memory: ClassVar[bool] = True
    takes_addresses: ClassVar[bool] = False  # of a gradient it needs to know only where it lies

    def __init__(self, optimizer: Update, key: Key, slots: list[ParamSlot]) -> None:
        self.optimizer, self.key, self.slots = optimizer, key, slots
        self.sharded = any(is_sharded(m.p) for m in slots)
        values = [local(m.p).detach() for m in slots]
        self.numels = [value.numel() for value in values]
        self.addresses = [value.data_ptr() for value in values]
        # The values themselves are not held: when a parameter's data moves elsewhere, its old memory must be freed.
        self._kinds = kinds_of(values)
        self._params = [m.p for m in slots]
        # Of a gradient only its address is read, whatever the optimizer.
        self._by_address = self.takes_addresses and not (key.variant.prologue or key.variant.sampled)
        self.gradients: list[Tensor | None] = []
        self.gradient_addresses = array("q")  # where they lie, 0 for none; not of a backend that takes no memory
        self.complete = False  # every parameter has a gradient in this step
        self.indices = [m.index for m in slots]
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        self._all = self.indices == list(range(count))
        self._states: list[Tensor] = []  # the tensors among them, as they were noted
        self._state_addresses: list[int] = []
        self._state_guards: Any = None  # False where there can be none
        self._state_kinds: list[Any] = []
        self._guards: Any = None
        self._examined = False  # whether gradients were examined before
        self._gatherer: Gatherer | None = None
        self._gathered = False  # whether it found the gradients of this step
        self._lay_out_states(values)

    @abstractmethod
    def counts_match(self) -> bool:
        """Whether nobody else has written the counts, which must lie where they did."""

    # States.

    def parts_of(self, m: ParamSlot) -> list[list[Tensor]]:
        """What a parameter and each of its states is kept as, in the rule's order: the parts, as they are here."""
        param, *kept = self.key.codecs
        own = [[local(m.p).detach(), *(m.state[name] for name in part_names(param, None))]]
        for name, codec in zip(self.key.variant.state_names, kept, strict=True):
            own.append([m.state[part] for part in (name, *part_names(codec, name))])
        return [list(map(local, parts)) for parts in own]

    def _lay_out_states(self, values: list[Tensor]) -> None:
        """Bring the states into the memory layout that the backend needs, for these (local) parameters."""
        if self.takes_memory:
            param, *kept = self.key.codecs
            names, quantized = part_names(param, None), list[str]()
            for name, codec in zip(self.key.variant.state_names, kept, strict=True):
                if codec.block_size:
                    quantized += [name, *part_names(codec, name)]
                else:
                    names.append(name)
            for m, value in zip(self.slots, values, strict=True):
                for name in names:
                    held = local(m.state[name])
                    if not same_layout(held, value):
                        m.state[name] = with_local(m.state[name], in_layout_of(value, held))
                for name in quantized:  # codes and scales lie one after the other, whatever their parameter's layout
                    held = local(m.state[name])
                    if not held.is_contiguous():
                        m.state[name] = with_local(m.state[name], held.contiguous())

    def note_states(self) -> None:
        """Take note of the states as they are now: the objects, and their addresses."""
        # A plain dict does not count its changes.
        self._changes = WatchedState.changes if all(type(m.state) is WatchedState for m in self.slots) else None
        self._state_dicts = [m.state for m in self.slots]
        self._state_known = [*chain.from_iterable(map(dict.values, self._state_dicts)), _END]
        states = [v for v in self._state_known if isinstance(v, Tensor)]
        if list(map(id, states)) != list(map(id, self._states)):
            self._states = states
            self._state_guards, self._state_kinds = None, kinds_of(self._states_here())
        self._state_addresses = list(map(Tensor.data_ptr, self._states_here()))
        if self._gatherer is not None:
            self._gatherer.watch(self._states)

    def _states_here(self) -> list[Tensor]:
        """The tensors among the states, of sharded ones the local parts."""
        return list(map(local, self._states)) if self.sharded else self._states

    def _states_match(self) -> bool:
        """Whether the states are those that were noted, in the memory that they had."""
        if not self._states_are_held():
            return False
        here = self._states_here()
        if list(map(Tensor.data_ptr, here)) != self._state_addresses or not self.counts_match():
            return False
        # Under a dispatch mode, as a capture's tape is one, the guards know nothing again.
        if self._state_guards and self._state_guards.check(*here):
            return True
        if kinds_of(here) != self._state_kinds:
            return False
        if self._state_guards is None:  # not made before they are asked for: that takes longer than most steps
            self._state_guards = guards_of(here) or False
        return True

    def _states_are_held(self) -> bool:
        """Whether the states hold the objects that were noted."""
        if self._changes != WatchedState.changes:
            changes = WatchedState.changes
            found = chain(chain.from_iterable(map(dict.values, self._state_dicts)), (_END,))
            if not all(map(is_, found, self._state_known)):
                return False
            self._changes = None if self._changes is None else changes
        return True

    def moved(self) -> list[int]:
        """The indices of the parameters that have moved since the bucket was made, or have other states."""
        states = self.optimizer.state
        return [
            m.index
            for m, address in zip(self.slots, self.addresses, strict=True)
            if local(m.p).data_ptr() != address or (m.state and states.get(m.param) is not m.state)
        ]

    # Gradients.

    def bind(self, gradients: Sequence[Tensor | None] | Mapping[int, Tensor | None]) -> bool:
        """Whether the bucket can run with these (local) gradients; it keeps them for the step, laid out as needed."""
        values = self._values()
        if list(map(Tensor.data_ptr, values)) != self.addresses or not self._states_match():
            return False
        own = gradients if self._all and isinstance(gradients, list) else [gradients[i] for i in self.indices]
        try:
            ready = self._guards is not None and self._guards.check(*values, *own)
        except TypeError:  # one is None
            ready = False
        if not ready:
            if not self._fit(values, own):
                return False
            own = self._laid_out(values, own)
        self._gathered = False
        self.complete = ready or all(g is not None for g in own)
        return self._take(own)

    def bind_gathered(self) -> bool:
        """Whether the bucket can run with the gradients that its parameters have now. Only their addresses are read.

        False where :meth:`bind` must examine them.
        """
        found = self._gatherer
        self._gathered = False
        if (
            found is not None
            and (self._changes == WatchedState.changes or self._states_are_held())
            and found.gather()
            and self.counts_match()
        ):
            self.complete = found.complete
            self._gathered = self._take_addresses(found.addresses, found.aligned)
        return self._gathered

    def present(self) -> list[bool]:
        """Of each parameter, whether it has a gradient in this step."""
        if self._gathered and self._gatherer is not None:
            return [address != 0 for address in self._gatherer.addresses]
        return [g is not None for g in self.gradients]

    def note_gradients(self) -> None:
        """Prepare to gather the gradients of the next step, after one with those that the parameters have."""
        if self._by_address:
            self._gatherer = gatherer_of(self._params, self._states, self.key.gradient) or self._gatherer

    def _values(self) -> list[Tensor]:
        """The parameters, as they are here."""
        if not self.sharded:
            return self._params
        try:
            return locals_of(self._params)
        except AttributeError:  # some are ordinary tensors
            return list(map(local, self._params))

    def _fit(self, values: list[Tensor], own: list[Tensor | None]) -> bool:
        """Whether parameters and gradients are of the kind that the bucket is for."""
        key, groups = self.key, self.optimizer.param_groups
        # A group's hyperparameters decide whether single rows will do.
        if key.sparse and any(self.optimizer.sparse_gradients(groups[m.group]) != "rows" for m in self.slots):
            return False
        wanted = (key.gradient, key.device, torch.sparse_coo if key.sparse else torch.strided)
        return kinds_of(values) == self._kinds and gradients_fit(values, own, wanted, self.takes_memory)

    def _laid_out(self, values: list[Tensor], own: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients as the backend takes them, for these parameters."""
        if self.key.sparse:  # an element that is held twice is meant to be added up first
            return [g if g is None else g.coalesce() for g in own]
        laid_out = list(own)
        for i, (value, g) in enumerate(zip(values, own, strict=True)):
            if g is not None:
                plain = g.resolve_neg().resolve_conj()
                laid_out[i] = in_layout_of(value, plain) if self.takes_memory else plain
        # A plan of one step, or one whose gradients are soon gathered, needs no guards.
        if self._examined and all(g is not None and g is h for g, h in zip(own, laid_out, strict=True)):
            self._guards = guards_of([*values, *own])  # type: ignore[list-item]  # there are all
        self._examined = True
        return laid_out

    def _take(self, gradients: list[Tensor | None]) -> bool:
        """Keep the gradients for the step."""
        if not (self._by_address or self.key.differentiable):
            # torch makes views of any tensor's data, and not of a tensor of inference mode that was given other data.
            gradients = [g if g is None else g.data for g in gradients]
        self.gradients = gradients
        if not self.takes_memory:
            return True
        addresses = addresses_of(gradients)
        if not all(addresses) and any(g is not None and not at for g, at in zip(gradients, addresses, strict=True)):
            return False  # the memory of one was freed
        aligned = not self.key.aligned or all_aligned(addresses)
        return self.key.variant.prologue or self._take_addresses(addresses, aligned)

    def _take_addresses(self, addresses: array[int], aligned: bool) -> bool:
        """Take note of where the gradients lie; False where a kernel was compiled for other addresses.

        Args:
            addresses: of them; 0 for none.
            aligned: whether all are multiples of 16, if that matters.
        """
        if self.key.aligned and not aligned:
            return False
        self.gradient_addresses = addresses
        return True

    def accept(self, gradients: list[Tensor | None]) -> None:
        """Take what a prologue made of the gradients."""
        if self.takes_memory:
            self._take_addresses(addresses_of(gradients), True)

    def take_update(self, position: int, update: Tensor) -> None:
        """Replace a parameter's gradient by what a prologue made of it."""
        update = local(update).to(self.key.gradient)
        if self.takes_memory:
            update = in_layout_of(local(self.slots[position].p), update)
        self.gradients[position] = update.clone() if self.key.aligned and update.data_ptr() % 16 else update

    def mark_written(self) -> None:
        """Tell autograd of writes behind its back: a graph that saved a parameter must notice."""
        if self._gathered and self._gatherer is not None:
            self._gatherer.written()
            return
        written = self._values()
        if not self.complete:
            written = [p for p, g in zip(written, self.gradients, strict=True) if g is not None]
        torch.autograd.graph.increment_version(written)
