"""How a step runs: parameters sorted into buckets, each run by one backend, with what can be kept from step to step.

A plan is made once and kept while it fits: the same parameters at the same addresses, the same states, the same
options. Gradients may come and go and move; schedules may change any hyperparameter.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import is_, itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends import bucket_class
from ..backends.norms import over_shards, partial_norms
from ..buckets.bucket import Bucket
from ..buckets.gradient_norm import EUCLIDEAN, Scaling, Signal, on_one_device, signal_from
from ..buckets.key import Key
from ..buckets.members import Member
from ..buckets.state import State, States
from ..dispatch import Backend, Choice, LaunchError, Layout, Request, choose, this_machine
from ..precision.codecs import (
    PRECISION,
    Codec,
    check_corrections,
    check_state,
    held_codec,
    held_parameter_codec,
    parameter_codec,
    part_names,
    state_codec,
)
from ..spec import Update
from ..util.gather import STEPS, WORTHWHILE, Objects, library
from ..util.layout import (
    all_aligned,
    has_memory,
    is_sharded,
    is_wrapper,
    layout,
    local,
    ordinary,
    overlapping,
    placements_of,
)
from .fallback import prepared, replaced
from .prologue import check_states, run_prologues, warm_prologue

# Elements whose updates a prologue may hold at a time. A step of more parameters is taken in pieces: in one, it would
# need as much memory again as all the gradients.
PIECE = 1 << 27


class Entry(NamedTuple):
    """A parameter on its way into a plan: what decides its bucket."""

    place: int  # among the optimizer's parameters
    group: int
    p: Tensor
    gradient: torch.dtype
    codecs: tuple[Codec, ...]  # of the parameter and the states
    g_aligned: bool
    parts: Sequence[Tensor]  # of the parameter and the states, those that are there and will stay
    overlaps: bool
    sparse: bool
    wrapped: bool  # the gradient or a state is a wrapper


def request_for(
    optimizer: Update, group: dict[str, Any], p: Tensor, known: Layout | None = None, sparse: bool = False
) -> Request:
    """What is asked of a backend for parameter `p` of `group`.

    Args:
        known: what stands in the way of a kernel, if it is known; else it is asked of the parameter.
    """
    return Request(
        device=p.device.type,
        dtype=p.dtype,
        layout=known or layout(local(p)),
        differentiable=bool(group.get("differentiable")),
        sparse=sparse or not optimizer.takes_dense_gradients,
        pinned=None if optimizer.backend == "auto" else cast(Backend, optimizer.backend),
        fused=group.get("fused"),
        foreach=group.get("foreach"),
    )


def key_for(optimizer: Update, entry: Entry) -> Key:
    """The bucket of a parameter."""
    group = optimizer.param_groups[entry.group]
    known: Layout | None = "overlapping" if entry.overlaps else "wrapper" if entry.wrapped else None
    choice = choose(request_for(optimizer, group, entry.p, known, entry.sparse), this_machine())
    if not local(entry.p).numel():
        choice = Choice("eager", "no elements here: the step is only counted")
    key = Key(
        choice,
        entry.p.device,
        optimizer.running_variant(group),
        entry.gradient,
        entry.codecs,
        aligned=choice.backend == "triton" and entry.g_aligned and all_aligned(t.data_ptr() for t in entry.parts),
        capturable=bool(group.get("capturable")),
        differentiable=bool(group.get("differentiable")),
        sparse=entry.sparse,
    )
    # A skipped step is not counted: where only the device knows of it, the device counts.
    return key._replace(capturable=True) if optimizer.amp is not None and bucket_class(key).reads_signal else key


def check_gradient(optimizer: Update, group: dict[str, Any], index: int, p: Tensor, local_g: Tensor) -> None:
    """Raise the error that torch would of a (local) gradient that cannot be used."""
    name = type(optimizer).__name__
    if local_g.layout != torch.strided:
        why = optimizer.sparse_gradients(group) if local_g.is_sparse else "only torch.sparse_coo ones can be run"
        if why != "rows":
            raise RuntimeError(
                f"{name} does not support sparse gradients here: {why}; the gradient of parameter {index} is "
                f"{local_g.layout}. Build the embedding with sparse=False, or call grad.to_dense() before the step."
            )
    elif not optimizer.takes_dense_gradients:
        raise RuntimeError(
            f"{name} does not support dense gradients, which that of parameter {index} is. Build the embedding with "
            "sparse=True, or give it to another optimizer."
        )
    if is_sharded(local_g):
        raise RuntimeError(
            f"{name}: the gradient of parameter {index} is a DTensor, the parameter an ordinary tensor. "
            "Assign a gradient of the parameter's own kind."
        )
    check_memory(optimizer, index, "its gradient", local_g)
    local_p = local(p)
    for what in ("shape", "device"):
        ours, theirs = getattr(local_g, what), getattr(local_p, what)
        if ours != theirs:
            raise RuntimeError(
                f"{name}: the gradient of parameter {index} has {what} {ours}, the parameter {theirs}. "
                "Clear the gradients after moving or reshaping parameters (zero_grad())."
            )
    if local_p.is_meta and group.get("fused"):
        # Elsewhere another backend steps in; but a step of tensors without memory is a forgotten to_empty().
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported devices; parameter "
            f"{index} is {p.dtype} on meta. Give the model memory first (to_empty())."
        )
    if local_g.is_complex() != local_p.is_complex():
        raise RuntimeError(
            f"{name}: the gradient of parameter {index} is {local_g.dtype}, the parameter {local_p.dtype}. "
            "Give both real, or both complex."
        )


def check_memory(optimizer: Update, index: int, what: str, tensor: Tensor) -> None:
    """Raise RuntimeError where an ordinary (local) tensor has no memory, or none that may be written now."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{type(optimizer).__name__}: parameter {index}, or {what}, was made in inference mode, outside of which "
            "it can't be written. Make it anew (tensor.clone()), or step in inference mode."
        )
    plain = tensor.layout == torch.strided and tensor.device.type != "meta" and not is_wrapper(tensor)
    if plain and tensor.numel() and not has_memory(tensor):
        raise RuntimeError(
            f"{type(optimizer).__name__}: the memory of parameter {index}, or of {what}, was freed: its storage has "
            f"{tensor.untyped_storage().nbytes()} bytes for {tensor.numel():,} elements of {tensor.dtype}. "
            "Give it back before the step."
        )


def check_place(optimizer: Update, index: int, p: Tensor, name: str, state: Tensor) -> None:
    """Raise RuntimeError where a state lies where its parameter's step can't write it."""
    if state.device != p.device:
        raise RuntimeError(
            f"{name} of parameter {index} is on {state.device}, the parameter on {p.device}. Move the state back "
            "before the step."
        )
    if is_wrapper(local(state)) and not is_wrapper(local(p)):
        raise RuntimeError(
            f"{name} of parameter {index} is a {type(local(state)).__name__}, the parameter an ordinary tensor: a "
            "rule's state must be one, too. Dequantize it (state.dequantize()), or clear opt.state."
        )
    check_memory(optimizer, index, name, local(state))


def entries_of(
    optimizer: Update,
    params: list[Tensor],
    gradients: Gradients,
    previous: Plan | None = None,
    every: bool = False,
    place: int | None = None,
    repeats: bool = False,
) -> list[Entry]:
    """The parameters that belong to a plan: those with a gradient or a state, or all of them. Changes nothing.

    One without a gradient is taken to have the dtype and alignment that the previous plan knew, else its own.

    Args:
        every: all parameters, whether there is a gradient or not.
        place: that of the only parameter that is asked about, which overlaps no other.
        repeats: whether a parameter is there twice: then only those with a gradient belong to a plan.
    """
    ends = list(accumulate(len(group["params"]) for group in optimizer.param_groups))
    variants = [optimizer.running_variant(group) for group in optimizer.param_groups]
    counted = [optimizer.counted_names(group) for group in optimizer.param_groups]
    overlaps = overlapping([local(p) for p in params]) if place is None else set()
    known = {m.index: bucket.key for bucket in previous.buckets for m in bucket.members} if previous is not None else {}
    entries = []
    for index in range(len(params)) if place is None else [place]:
        p, g, group = params[index], gradients[index], bisect_right(ends, index)
        if is_lazy(p):  # it gets its shape in the first forward
            continue
        state = optimizer.state.get(p, {})
        variant = variants[group]
        if variant.prologue and p.is_complex() and g is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} does not support complex parameters; parameter {index} is {p.dtype}. "
                "Give it to another optimizer."
            )
        names = variant.state_names
        lacking = any(state.get(name) is None for name in (*names, *counted[group])) or (variant.prologue and not state)
        if g is None and not every and (repeats or lacking):
            continue
        if variant.prologue:
            check_states(optimizer, optimizer.param_groups[group], index, p, state)
        if any(size > 1 and stride == 0 for size, stride in zip(local(p).shape, local(p).stride(), strict=True)):
            raise RuntimeError(
                f"{type(optimizer).__name__}: parameter {index} of shape {tuple(p.shape)} is an expanded tensor, whose "
                "elements share memory and cannot be updated one by one. Make it a parameter of its own (p.clone())."
            )
        check_memory(optimizer, index, "its state", local(p))
        for name, value in state.items():
            if isinstance(value, Tensor) and name not in counted[group]:
                check_place(optimizer, index, p, name, value)
        for name in names:
            if state.get(name) is not None:
                check_state(optimizer, index, p, name, state)
        check_corrections(index, p, state)
        if g is not None:
            check_gradient(optimizer, optimizer.param_groups[group], index, p, g)
            sparse = g.is_sparse
            dtype, aligned = g.dtype, sparse or g.data_ptr() % 16 == 0
        elif index in known:
            # A bucket that is not Triton's knows nothing of alignment.
            key = known[index]
            dtype, aligned, sparse = key.gradient, key.aligned or key.choice.backend != "triton", key.sparse
        else:
            dtype, aligned, sparse = p.dtype, True, not optimizer.takes_dense_gradients
        own = optimizer.param_groups[group]
        held = [held_parameter_codec(state, p), *(held_codec(optimizer, state, name, p) for name in names)]
        wanted = [parameter_codec(own, p.dtype)]
        wanted += [state_codec(optimizer, own, n, p, h) for n, h in zip(names, held[1:], strict=True)]
        parts = [local(p)]
        for role, now, then in zip((None, *names), held, wanted, strict=True):
            if now is not None and now.dtypes == then.dtypes and now.each == then.each:
                parts += [local(state[part]) for part in ([] if role is None else [role]) + part_names(now, role)]
        if sparse and (kept := [codec.name for codec in wanted if codec.name != "plain"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}: the gradient of parameter {index} is sparse, and its rows are updated "
                f"where they were gathered, not kept as {kept[0]}. Use state_dtype=None, ema_dtype=None and "
                'param_precision="storage" for its group.'
            )
        wrapped = any(is_wrapper(t) for t in (*parts, g) if t is not None)
        entries.append(Entry(index, group, p, dtype, tuple(wanted), aligned, parts, index in overlaps, sparse, wrapped))
    shared = sharing_states(entries)
    return [e._replace(overlaps=True) if e.place in shared else e for e in entries] if shared else entries


def sharing_states(entries: list[Entry]) -> set[int]:
    """The places of parameters whose states begin where another's do: they are updated one after the other."""
    of: dict[int, set[int]] = {}
    for entry in entries:
        for t in entry.parts[1:]:
            of.setdefault(t.data_ptr(), set()).add(entry.place)
    return set().union(*(places for at, places in of.items() if at and len(places) > 1))


# One for each parameter, by its place.
Gradients = Sequence[Tensor | None] | Mapping[int, Tensor | None]


class Plan:
    """The buckets of an optimizer's parameters.

    Args:
        optimizer: whose states are made here for parameters that have none yet.
        failed: of an optimizer's buckets those whose backend failed, and what they became.
        params: its parameters, in the order of the groups.
        gradients: the local one of each, None where there is none.
        previous: the plan it replaces.
        repeats: whether one of them is there twice.
        place: of the only parameter that it is for, if it is for one.

    Raises:
        RuntimeError: a gradient is sparse or does not match its parameter, or a pinned backend cannot run one.
            Everything is checked before anything changes.
    """

    def __init__(
        self,
        optimizer: Update,
        failed: dict[Key, Key],
        params: list[Tensor],
        gradients: Gradients,
        previous: Plan | None = None,
        repeats: bool = False,
        place: int | None = None,
    ) -> None:
        self.optimizer, self._failed, self.params = optimizer, failed, params
        # A plan of one is made for each parameter: it must not go through all of them.
        self.sharded = any(map(is_sharded, params if place is None else [params[place]]))
        self.placements = list(map(placements_of, params)) if self.sharded and place is None else []
        self.options = options_of(optimizer)
        self._seen: list[Any] | None = None  # what the options were made of when they were last found to be these
        same = previous if previous is not None and previous.covers(params) else None
        members = sort_members(optimizer, entries_of(optimizer, params, gradients, same, place=place, repeats=repeats))
        ready = prepared(optimizer, failed, members)
        # In the order of the parameters, not of the buckets: who gathers sharded states goes through them in their
        # order on every rank, and buckets differ between ranks.
        started = sorted(((m, key) for key, own in ready.items() for m in own), key=lambda pair: pair[0].index)
        begun: dict[Any, Tensor] = {}
        for m, key in started:
            m.start(optimizer, key, begun)
        self.buckets = [bucket_class(key)(optimizer, key, own) for key, own in ready.items()]
        pieces = sorted({bucket.key.piece for bucket in self.buckets})
        self._pieces = [[bucket for bucket in self.buckets if bucket.key.piece == piece] for piece in pieces]
        self._state_dicts = list(optimizer.state.values()) if place is None else []
        self._states: States | None = None  # in which they were found, at a count of changes
        self._changes = -1
        planned = {m.index for m, _ in started}
        self._without = [i for i in range(len(params)) if i not in planned] if place is None else []
        self._idle = Objects([params[i] for i in self._without])
        self._groups = [Objects(list(group["params"])) for group in optimizer.param_groups] if place is None else []
        self._looked = 0  # steps for which Python looked at all gradients

    def covers(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters it was made for."""
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def fits(self, gradients: Gradients) -> bool:
        """Whether the plan can run a step with these (local) gradients. The buckets keep them for it."""
        return (
            all(gradients[i] is None for i in self._without)
            and self._still_holds()
            and all(bucket.fits(gradients) for bucket in self.buckets)
        )

    def gather(self) -> bool:
        """Whether the plan can run a step with the gradients that the parameters have now, of which it needs to know
        only where they lie. False where :meth:`fits` must look at them.
        """
        return (
            library.loaded is not None
            and self._are_still_those_of(self.optimizer.param_groups)
            and self._still_holds()
            and not (self.sharded and self.optimizer.scales_gradients)  # ranks speak of their norm
            and self._idle.have_no_gradients()
            and self._buckets_gather()
        )

    def _buckets_gather(self) -> bool:
        for bucket in self.buckets:  # noqa: SIM110  a generator takes as long as what it asks
            if not bucket.gather():
                return False
        return True

    def _are_still_those_of(self, groups: list[dict[str, Any]]) -> bool:
        own = self._groups
        if len(groups) != len(own):
            return False
        for objects, group in zip(own, groups, strict=True):  # noqa: SIM110  a generator takes as long as what it asks
            if not objects.are(group["params"]):
                return False
        return True

    def note_gradients(self) -> None:
        """After a step for which Python looked at the gradients that the parameters have: now and then, make ready to
        gather those of the next.
        """
        self._looked += 1
        if self._looked % STEPS == 0:
            if self._looked * len(self.params) >= WORTHWHILE:
                library.begin()
            for bucket in self.buckets:
                bucket.note_gradients()

    def _still_holds(self) -> bool:
        return self._states_are_there() and self._options_hold()

    def _options_hold(self) -> bool:
        optimizer, seen = self.optimizer, self._seen
        now: list[Any] = [optimizer.amp, optimizer.scales_gradients]
        for values, group in zip(optimizer.hyperparameters.values, optimizer.param_groups, strict=True):
            now += [values.changes, optimizer.variant(group)]
        if now != seen:
            if options_of(optimizer) != self.options:
                return False
            self._seen = now
        return True

    def _states_are_there(self) -> bool:
        states, changes = self.optimizer.state, State.changes
        if states is self._states and changes == self._changes:
            return True
        there = len(states) == len(self._state_dicts) and all(map(is_, states.values(), self._state_dicts))
        if there and type(states) is States:  # another dict counts nothing
            self._states, self._changes = states, changes
        return there

    def step(self, scaling: Scaling | None = None) -> Signal | None:
        """Run the step for which the plan was found to fit. Nothing is counted before all buckets have run.

        Args:
            scaling: what to do with all gradients alike; None for nothing.

        Returns:
            What came of it.

        Raises:
            RuntimeError: a kernel could not be started, and its backend was asked for, or a part of the step was done
                before.
        """
        self._begun = False
        try:
            return self._step(scaling)
        except LaunchError as error:
            if self._begun:
                raise RuntimeError(
                    f"{type(self.optimizer).__name__}: {error}. A part of the parameters or states was updated before, "
                    "the others were not. Load a checkpoint before you go on."
                ) from error
            failed = {
                bucket: replaced(self.optimizer, self._failed, bucket, error)
                for bucket in self.buckets
                if bucket.launches_kernels
            }
            self.buckets = [failed.get(bucket, bucket) for bucket in self.buckets]
            self._pieces = [[failed.get(bucket, bucket) for bucket in piece] for piece in self._pieces]
            return self._step(scaling)

    def _step(self, scaling: Scaling | None) -> Signal | None:
        signal, skips = None, scaling is not None and scaling.look
        if scaling is not None:
            signal = self._signal(scaling)
            # Where something else than the kernel that reads the signal would run, the host asks.
            asked = skips and not all(bucket.takes_signal for bucket in self.buckets)
            if asked and bool(signal.tensor[1]):
                for bucket in self.buckets:
                    bucket.gradients = []
                return signal
        for bucket in self.buckets:
            bucket.next_rows()
            bucket.signal = None
            if signal is not None and bucket.takes_signal:
                bucket.signal = signal.on(bucket.key.device)
            elif signal is not None:
                here = signal.tensor[0]
                factor = here.item() if here.device.type == "cpu" else here.to(bucket.key.device)
                bucket.rows = [r and r._replace(factor=r.factor * factor) for r in bucket.rows]
        for piece in self._pieces:
            if any(bucket.key.variant.prologue for bucket in piece):
                self._begun = True
                run_prologues(self.optimizer, piece)
            for bucket in piece:
                if any(bucket.rows):
                    bucket.run(bucket.rows)
                    self._begun = True
                if bucket.key.variant.prologue:
                    bucket.gradients = []  # the memory is the next piece's
        for bucket in self.buckets:
            bucket.commit(skips)
        return signal

    def _signal(self, scaling: Scaling) -> Signal:
        """What the step does with all gradients."""
        device = self.buckets[0].key.device if self.buckets else torch.device("cpu")
        partials = None
        if scaling.reads and self.sharded:
            pairs = [
                (m.index, m.p, g)
                for bucket in self.buckets
                for m, g in zip(bucket.members, bucket.gradients, strict=True)
                if g is not None
            ]
            pairs.sort(key=itemgetter(0))  # every rank in the same order
            found = over_shards([p for _, p, _ in pairs], [g for _, _, g in pairs], EUCLIDEAN)
            partials = on_one_device(found, device)
        elif scaling.reads:
            found = []
            for bucket in self.buckets:
                if bucket.complete or any(bucket.present()):
                    found += norms_of(bucket)
            partials = on_one_device(found, device)
        partials = None if partials is None else ordinary(partials)
        for bucket in self.buckets:
            if bucket.takes_signal:
                return bucket.signal_from(partials, scaling, device)
        return signal_from(partials, scaling, device)


class PlanOfOne(Plan):
    """The plan of one parameter, whose gradient comes alone."""

    def fits(self, gradients: Gradients) -> bool:
        states = self.optimizer.state
        return (
            self._options_hold()
            # Of a parameter without any state, no dict may be there.
            and all(states.get(m.p, None if m.state else m.state) is m.state for b in self.buckets for m in b.members)
            and all(bucket.fits(gradients) for bucket in self.buckets)
        )


def warm_up(optimizer: Update, failed: dict[Key, Key]) -> None:
    """See :meth:`RuleOptimizer.warmup`."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [e for e in entries_of(optimizer, params, [p.grad for p in params], every=True) if e.p.requires_grad]
    for key, members in prepared(optimizer, failed, sort_members(optimizer, entries)).items():
        kind = bucket_class(key)
        kind.warm_up(optimizer, key, members)
        if optimizer.scales_gradients and not key.sparse and not kind.launches_kernels:
            zeros = torch.zeros(1 << 15, dtype=key.gradient, device=key.device)
            partial_norms([zeros], EUCLIDEAN, key.choice.backend)
        if key.variant.prologue:
            warm_prologue(optimizer, members)


def norms_of(bucket: Bucket) -> list[Tensor]:
    """Sums of the squares of a bucket's gradients: see norms.partial_norms."""
    found = bucket.partial_norms(EUCLIDEAN)
    if found is None:
        own = [g for g in bucket.gradients if g is not None]
        found = partial_norms(own, EUCLIDEAN, bucket.key.choice.backend)
    return found


def check_captured(optimizer: Update, plan: Plan) -> None:
    """Raise RuntimeError where replays of a captured step would not write the parameters and states that there are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not plan.covers(params):
        raise RuntimeError(
            f"the optimizer has {len(params)} parameters and had {len(plan.params)}, or others, when its step was "
            "captured: replays would update the old ones. Capture it again."
        )
    for bucket in plan.buckets:
        if moved := bucket.moved():
            raise RuntimeError(
                f"parameter {moved[0]} or one of its states lies elsewhere than when the step was captured: replays "
                "would write where it was. Capture it again."
            )


def sort_members(optimizer: Update, entries: list[Entry]) -> dict[Key, list[Member]]:
    """The parameters by bucket."""
    members: dict[Key, list[Member]] = {}
    elements = 0
    for entry in entries:
        member = Member(optimizer, entry.place, entry.group, entry.p)
        key = key_for(optimizer, entry)
        if key.variant.prologue:
            elements += entry.p.numel()  # of a sharded one all: the pieces must be every rank's
            key = key._replace(piece=elements // PIECE)
        members.setdefault(key, []).append(member)
    return members


def options_of(optimizer: Update) -> list[tuple[Any, ...]]:
    """What a plan depends on besides tensors, a group."""
    names = ("maximize", "foreach", "fused", "capturable", "differentiable", *PRECISION)
    of_all = (optimizer.amp, optimizer.scales_gradients)
    return [(of_all, optimizer.running_variant(group), *map(group.get, names)) for group in optimizer.param_groups]
