"""How a step runs: parameters sorted into buckets, each run by one backend, with what can be kept from step to step.

A plan is made once and kept while it fits: the same parameters at the same addresses, the same states, the same
options. Gradients may come and go and move; schedules may change any hyperparameter.
"""

from __future__ import annotations

from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from ..backends import bucket_class
from ..backends.norms import over_shards, partial_norms
from ..buckets.bucket import Bucket
from ..buckets.gradient_norm import EUCLIDEAN, GradientStats, Scaling, gradient_stats_from, on_one_device
from ..buckets.key import Key
from ..buckets.state import WatchedState, WatchedStates
from ..dispatch import LaunchError
from ..precision.codecs import PRECISION
from ..spec import Update, averages
from ..util.gather import STEPS, WORTHWHILE, ParamTable, library
from ..util.layout import is_sharded, ordinary, placements_of
from .entries import Gradients, entries_of, sort_params
from .fallback import prepared, replaced
from .measures import run_measures
from .offload import Offload
from .processes import check_seen_whole
from .prologue import run_prologues, warm_prologue

CHOICES = (int, str, type(None))
_rebuilt = attrgetter("rebuilt")
is_inference_mode_enabled = torch.is_inference_mode_enabled


class Plan:
    """The buckets of an optimizer's parameters.

    Args:
        optimizer: whose states are made here for parameters that have none yet.
        failed: keys of buckets whose backend failed, and the keys that replaced them.
        params: its parameters, in the order of the groups.
        gradients: the local one of each, None where there is none.
        previous: the plan it replaces.
        repeats: whether a parameter is listed twice.
        only: the index of the parameter that it is for, if it is for one.

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
        only: int | None = None,
    ) -> None:
        self.optimizer, self._failed, self.params = optimizer, failed, params
        self._hyperparameters = optimizer.hyperparameters
        # A plan of one is made for each parameter: it must not go through all of them.
        own = params if only is None else [params[only]]
        self.sharded = any(map(is_sharded, own))
        self.devices = dict.fromkeys(p.device for p in own)
        self.placements = list(map(placements_of, params)) if self.sharded and only is None else []
        self.options = options_of(optimizer)
        self._seen: tuple[Any, ...] | None = None  # what the options were made of when they last matched
        same = previous if previous is not None and previous.same_params(params) else None
        known = {m.index: bucket.key for bucket in same.buckets for m in bucket.slots} if same is not None else {}
        entries = entries_of(optimizer, params, gradients, known, only=only, repeats=repeats)
        slots = sort_params(optimizer, entries)
        check_seen_whole(optimizer, [m.p for key, own in slots.items() if key.variant.staged for m in own])
        self._offload = Offload(slots) if any(key.home is not None for key in slots) else None
        ready = prepared(optimizer, failed, slots)
        # In the order of the parameters, not of the buckets: what gathers sharded states takes them in this order on
        # every rank, and buckets differ between ranks.
        started = sorted(((m, key) for key, own in ready.items() for m in own), key=lambda pair: pair[0].index)
        begun: dict[Any, Tensor] = {}
        for m, key in started:
            m.start(optimizer, key, begun)
        if self._offload is not None:
            self._offload.write_back(ready)
        self.buckets: list[Bucket] = [bucket_class(key)(optimizer, key, own) for key, own in ready.items()]
        self._note_who_takes_stats()
        self._has_prologue = any(bucket.key.variant.prologue for bucket in self.buckets)
        self._measures = any(bucket.key.variant.measures for bucket in self.buckets)
        pieces = sorted({bucket.key.piece for bucket in self.buckets})
        self._pieces = [[bucket for bucket in self.buckets if bucket.key.piece == piece] for piece in pieces]
        self._state_dicts = list(optimizer.state.values()) if only is None else []
        self._states: WatchedStates | None = None  # in which they were found, at a count of changes
        self._changes = -1
        planned = {m.index for m, _ in started}
        self._without = [i for i in range(len(params)) if i not in planned] if only is None else []
        self._idle = ParamTable([params[i] for i in self._without])
        self._looked = 0  # steps in which Python examined all gradients

    def same_params(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters it was made for."""
        return len(params) == len(self.params) and all(map(is_, params, self.params))

    def bind(self, gradients: Gradients) -> bool:
        """Whether the plan can run a step with these (local) gradients. The buckets keep them for it."""
        return all(gradients[i] is None for i in self._without) and self.matches() and self._bind_buckets(gradients)

    def _bind_buckets(self, gradients: Gradients) -> bool:
        if self._offload is not None:
            found = self._offload.bind(gradients)
            if found is None:
                return False
            gradients = found
        return all(bucket.bind(gradients) for bucket in self.buckets)

    def bind_gathered(self) -> bool:
        """Whether the plan can run a step with the gradients that the parameters have now, of which it needs to know
        only where they lie. False where :meth:`bind` must look at them.
        """
        if not self.matches() or (self._without and not self._idle.have_no_gradients()):
            return False
        if self.sharded and self.optimizer.scales_gradients:  # ranks speak of their norm
            return False
        if self._offload is not None:  # which copies them
            return False
        for bucket in self.buckets:  # noqa: SIM110  a generator takes as long as what it asks
            if not bucket.bind_gathered():
                return False
        return True

    def note_gradients(self) -> bool:
        """Prepare to gather the gradients of the next step, every few steps. Whether that was done. It is called after
        a step in which Python examined the gradients that the parameters have.
        """
        self._looked += 1
        if (self._looked - 1) % STEPS:
            return False
        if library.loaded is None:
            if self._looked == 1:
                library.load_built()
            elif self._looked * len(self.params) >= WORTHWHILE:
                library.start_build()
        if library.loaded is None:
            return False
        for bucket in self.buckets:
            bucket.note_gradients()
        return True

    def matches(self) -> bool:
        """Whether states and options are those that it was made for. Changes nothing that a step depends on."""
        same = self.optimizer.state is self._states and WatchedState.changes == self._changes
        return (same or self._states_are_there()) and self._options_hold()

    def _options_hold(self) -> bool:
        optimizer, held = self.optimizer, self._hyperparameters
        now = (
            optimizer.amp,
            held.max_norm is None,
            is_inference_mode_enabled(),
            *map(_rebuilt, held.values),
            *map(optimizer.variant, optimizer.param_groups),
        )
        if now != self._seen:
            if options_of(optimizer) != self.options:
                return False
            self._seen = now
        return True

    def _states_are_there(self) -> bool:
        states, changes = self.optimizer.state, WatchedState.changes
        there = len(states) == len(self._state_dicts) and all(map(is_, states.values(), self._state_dicts))
        if there and type(states) is WatchedStates:  # another dict counts nothing
            self._states, self._changes = states, changes
        return there

    def step(self, scaling: Scaling | None = None) -> GradientStats | None:
        """Run the step that the plan was bound for. Nothing is counted before all buckets have run.

        Args:
            scaling: what is done to all gradients; None for nothing.

        Returns:
            The stats of the gradients; None without `scaling`.

        Raises:
            RuntimeError: a kernel could not be started, and its backend was asked for, or a part of the step was done
                before.
        """
        self._begun = False
        step = self._step if self._offload is None else self._step_offloaded
        try:
            return step(scaling)
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
            self._note_who_takes_stats()
            return step(scaling)
        finally:
            if self._offload is not None:
                self._offload.let_go()

    def _step_offloaded(self, scaling: Scaling | None) -> GradientStats | None:
        assert self._offload is not None
        with self._offload.copying([bucket for piece in self._pieces for bucket in piece]):
            return self._step(scaling)

    def _step(self, scaling: Scaling | None) -> GradientStats | None:
        stats, skips = None, scaling is not None and scaling.check_finite
        if scaling is not None:
            stats = self._stats(scaling)
            # Where code runs that does not read the stats on the device, the host reads them.
            if skips and not self._all_take_stats and bool(stats.skip):
                for bucket in self.buckets:
                    bucket.gradients = []
                return stats
        for bucket in self.buckets:
            bucket.form_scalars()
            if stats is not None:
                bucket.scale(stats)
        offload = self._offload
        if offload is not None and (self._measures or self._has_prologue):
            offload.wait()
        if self._measures and run_measures(self.optimizer, self.buckets):
            self._begun = True
        for piece in self._pieces:
            if self._has_prologue and any(bucket.key.variant.prologue for bucket in piece):
                self._begun = True
                run_prologues(self.optimizer, piece)
            for bucket in piece:
                if any(bucket.rows):
                    rows = bucket.rows_to_run() if self._measures else bucket.rows
                    if offload is None or bucket.key.home is None:
                        bucket.run(rows)
                    else:
                        offload.run(bucket, rows)
                    self._begun = True
                    bucket.gradients = []  # the memory may be the next piece's
        if offload is not None:  # what stays counts in its average
            offload.wait()
        for bucket in self.buckets:
            bucket.commit(skips)
        return stats

    def _note_who_takes_stats(self) -> None:
        taking = [bucket for bucket in self.buckets if bucket.takes_stats]
        self._all_take_stats = len(taking) == len(self.buckets)
        self._takes_stats = next(iter(taking), None)
        first = next(iter([*taking, *self.buckets]), None)
        self._stats_device = torch.device("cpu") if first is None else first.key.device

    def _stats(self, scaling: Scaling) -> GradientStats:
        """The stats of all gradients of the step, where the first bucket is that reads them on its device."""
        device, partials = self._stats_device, None
        if scaling.needs_norm and self.sharded:
            pairs = [
                (m.index, m.p, g)
                for bucket in self.buckets
                for m, g in zip(bucket.slots, self._given(bucket), strict=True)
                if g is not None
            ]
            pairs.sort(key=itemgetter(0))  # every rank in the same order
            found = over_shards([p for _, p, _ in pairs], [g for _, _, g in pairs], EUCLIDEAN)
            partials = on_one_device(found, device)
        elif scaling.needs_norm:
            found = []
            for bucket in self.buckets:
                if bucket.complete or any(bucket.present()):
                    found += norms_of(bucket) if bucket.key.home is None else norms_at_home(self._given(bucket))
            partials = on_one_device(found, device)
        partials = None if partials is None else ordinary(partials)
        if self._takes_stats is None:
            return gradient_stats_from(partials, scaling, device)
        return self._takes_stats.gradient_stats_from(partials, scaling)

    def _given(self, bucket: Bucket) -> list[Tensor | None]:
        """A bucket's gradients where the parameters are."""
        if self._offload is None or bucket.key.home is None:
            return bucket.gradients
        return self._offload.given(bucket)


class PlanOfOne(Plan):
    """The plan of a single parameter, whose gradient arrives on its own."""

    def bind(self, gradients: Gradients) -> bool:
        states = self.optimizer.state
        return (
            self._options_hold()
            # A parameter that had no state must not have one now.
            and all(states.get(m.param, None if m.state else m.state) is m.state for b in self.buckets for m in b.slots)
            and self._bind_buckets(gradients)
        )


def warm_up(optimizer: Update, failed: dict[Key, Key]) -> None:
    """See :meth:`RuleOptimizer.warmup`."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [e for e in entries_of(optimizer, params, [p.grad for p in params], every=True) if e.p.requires_grad]
    for key, slots in prepared(optimizer, failed, sort_params(optimizer, entries)).items():
        kind = bucket_class(key)
        kind.compile(optimizer, key, slots, ahead=True)
        if optimizer.scales_gradients and not key.sparse and not kind.launches_kernels:
            zeros = torch.zeros(1 << 15, dtype=key.gradient, device=key.home or key.device)
            partial_norms([zeros], EUCLIDEAN, key.choice.backend if key.home is None else None)
        if key.variant.prologue:
            warm_prologue(optimizer, slots)


def norms_of(bucket: Bucket) -> list[Tensor]:
    """Sums of the squares of a bucket's gradients: see norms.partial_norms."""
    found = bucket.norms()
    if found is not None:
        return [found]
    own = [g for g in bucket.gradients if g is not None]
    return partial_norms(own, EUCLIDEAN, bucket.key.choice.backend)


def norms_at_home(gradients: list[Tensor | None]) -> list[Tensor]:
    """:func:`norms_of` gradients that are yet to be copied to the host."""
    return partial_norms([g for g in gradients if g is not None], EUCLIDEAN)


def options_of(optimizer: Update) -> list[tuple[Any, ...]]:
    """What a plan depends on besides tensors, a group."""
    names = ("maximize", "foreach", "fused", "capturable", "differentiable", "offload", *PRECISION)
    # Tensors made in inference mode can't be written outside of it: that is checked when a plan is made.
    of_all = (optimizer.amp, optimizer.scales_gradients, torch.is_inference_mode_enabled())
    return [
        (of_all, optimizer.variant(group), averages(group), choices_of(optimizer, group), *map(group.get, names))
        for group in optimizer.param_groups
    ]


def choices_of(optimizer: Update, group: dict[str, Any]) -> dict[str, Any]:
    """What of a group may decide which states are kept, and of what shape: all that is chosen, and not a quantity."""
    kept = optimizer.kept_states and optimizer.variant(group).staged
    return {name: value for name, value in group.items() if isinstance(value, CHOICES)} if kept else {}
