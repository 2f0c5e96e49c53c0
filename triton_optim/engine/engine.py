"""What runs an optimizer's steps, and all that is kept from one to the next: the only owner of plans."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..buckets.gradient_norm import GradientStats, scaling_of
from ..buckets.key import Key
from ..spec import Update
from ..util.gather import GroupTable
from ..util.hyperparameters import Check, Hyperparameters
from ..util.layout import is_sharded, local_gradient, local_gradients, placements_of
from ..util.on_device import capturing
from . import compile_op
from .captured import check_capture, check_captured
from .gradients import turns_of, without_needless_sparsity
from .plan import Plan, PlanOfOne, warm_up
from .probe import Probe
from .processes import Agreement, check_norm_is_whole

# Each module on the way to a function takes as long as the function.
grad_enabled, set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
Swap = Literal["averaged_parameters()", "eval()"]


class Release(Protocol):
    """What ends rounds of steps while gradients are released in backward."""

    @property
    def averaged(self) -> float:
        """Of how many values the averages were at the start of the round."""

    def step(self, gradients: list[Tensor | None] | None = None) -> None:
        """End a round."""

    def restart(self) -> None:
        """Start a round with the states as they are."""

    def follow(self, params: list[Tensor], repeats: bool) -> None:
        """Release the gradients of these, and of no others."""


class Engine:
    """Runs the steps of an optimizer.

    Args:
        optimizer: whose parameter groups and states are used as they are in each step.
        check: called with a group that was edited; see GroupValues.read.

    Attributes:
        params: the parameters, in the order of the groups.
        repeats: whether a parameter is listed twice.
        plan: how the last step ran; None where the next has to make one.
        hyperparameters: those of all groups as they were when a step last read them.
        failed: keys of buckets whose backend failed, and the keys that replaced them.
        release: what releases gradients in backward; None if nothing does.
        max_grad_norm: the largest norm of all gradients together. Here, not on the optimizer: what trainers wrap it in
            would keep what is set.
        swapped: what put the averages in the place of the weights; None where the parameters are the weights.
        stats: what the last step did with all gradients.
        limited: whether it limited their norm.
        name: of the optimizer.
        handle: by which the operator of compiled steps finds the engine.
    """

    def __init__(self, optimizer: Update, check: Check) -> None:
        self._optimizer, self._check = optimizer, check
        self.name = type(optimizer).__name__
        self.release: Release | None = None
        self.max_grad_norm: float | None = None
        self.swapped: Swap | None = None
        self.hyperparameters = Hyperparameters()
        self.failed: dict[Key, Key] = {}
        self._captured: list[Plan] = []
        self._agreement = Agreement()
        self.handle = compile_op.register(self)
        self.reset()

    def reset(self) -> None:
        """Forget what was kept of the parameters, states and groups, which have become others."""
        self.params: list[Tensor] = []
        self._sizes: list[int] = []  # how many of them each group has
        self.repeats = False
        self.plan: Plan | None = None
        self._plans_of_one: dict[int, PlanOfOne] = {}  # with gradient release
        self._groups: GroupTable | None = None  # of which parameters the plan is, once steps are gathered
        self.probe = Probe()
        self.stats: GradientStats | None = None
        self.limited = False
        self.hyperparameters.values = []

    def step(self, given: list[Tensor | None] | None = None) -> None:
        """Run a step, or end a round of released gradients; `given` as of :meth:`update`."""
        if self.release is None:
            self.update(given)
            return
        told = [self._optimizer.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
        if any(value is not None for value in told):
            raise RuntimeError(
                f"{type(self._optimizer).__name__}: a gradient scaler can't step gradients that were released in "
                "backward. Use bfloat16, which needs none, or remove() the handle of gradient release."
            )
        self.release.step(given)

    def update(self, given: list[Tensor | None] | None = None) -> None:
        """Run a step.

        Args:
            given: the gradients, one for each parameter in the order of the groups; None skips a parameter. Left out,
                those that the parameters have.
        """
        if self.swapped:
            self.check_not_swapped()
        optimizer, plan, table = self._optimizer, self.plan, self._groups
        same = 0 if table is None else table.matches(optimizer.param_groups)
        if same < 2:
            self.read_groups()
        else:
            self.hyperparameters.max_norm = self.max_grad_norm
        optimizer._opt_called = True
        if same and given is None and plan and not any(map(capturing, plan.devices)) and plan.bind_gathered():
            recording = grad_enabled()
            set_grad_enabled(False)  # the context manager takes as long as the launch
            try:
                self._run(plan)
            finally:
                set_grad_enabled(recording)
            return
        self.take_params()
        gradients = [p.grad for p in self.params] if given is None else given
        if captured_on := self._captured_on():
            check_capture(self._optimizer, self.params, gradients, captured_on)
        recording = any(group.get("differentiable") for group in optimizer.param_groups)
        with nullcontext() if recording and torch.is_grad_enabled() else torch.no_grad():
            for own in turns_of(self.params, gradients) if self.repeats else [gradients]:
                self._update(own)
        if given is None and self.plan is not None and not self.repeats and self.plan.note_gradients():
            self._groups = GroupTable(optimizer.param_groups, self.hyperparameters.values)

    def update_one(self, index: int, g: Tensor | None) -> None:
        """Run a step of the parameter number `index` alone, with this gradient."""
        self.check_not_swapped()
        self.forget_probe()
        self.read_groups()
        p = self.params[index]
        with torch.no_grad():
            gradients = {index: None if g is None else local_gradient(p, g)}
            plan = self._plans_of_one.get(index)
            if plan is None or not plan.bind(gradients):
                plan = self._plans_of_one[index] = PlanOfOne(
                    self._optimizer, self.failed, self.params, gradients, only=index
                )
                check_fits(plan, gradients)
            plan.step()

    def take_params(self) -> None:
        """Take note of the parameters that there are. Where they are others than before, or those of other groups, all
        that was made for them is dropped.
        """
        lists = list(map(itemgetter("params"), self._optimizer.param_groups))
        params, sizes = list(chain.from_iterable(lists)), list(map(len, lists))
        if sizes == self._sizes and all(map(is_, params, self.params)):
            return
        # FSDP and others put parameters of another kind there. Those of the first step are looked at with their groups.
        if self._sizes:
            for group in self._optimizer.param_groups:
                self._check(group, None)
        repeats = len(set(map(id, params))) < len(params)
        if self.release is not None:
            self.release.follow(params, repeats)
        self.params, self._sizes, self.repeats = params, sizes, repeats
        self.plan, self._plans_of_one, self._groups, self.limited = None, {}, None, False

    def drop_plans(self, what: str) -> None:
        """Let go of the states, which are to lie elsewhere; `what` moves them.

        Raises:
            RuntimeError: a captured step would write where they were.
        """
        if self._captured:
            raise RuntimeError(
                f"{what} after a step was captured: its replays write where the states are now. Use an optimizer whose "
                "step was not captured."
            )
        self.forget_probe()
        self.plan, self._plans_of_one, self._groups = None, {}, None

    def read_groups(self) -> None:
        """Take note of the hyperparameters as they are now, once a step. What the constructor would refuse raises, in
        every step that finds it.
        """
        held, groups = self.hyperparameters, self._optimizer.param_groups
        held.max_norm = self.max_grad_norm
        if len(held.values) != len(groups):
            self._groups = None
        held.read(groups, self._check, None if self._groups is None else self._groups.note_hyperparameters)

    def check_not_swapped(self, what: str = "step") -> None:
        """Raise RuntimeError where the parameters are their averages."""
        self.check_not_inside(what)
        if self.swapped is not None:
            raise RuntimeError(
                f"{self.name}: {what} in evaluation mode: the parameters are their averages, and not the weights that "
                "the states belong to. Call optimizer.train() first; where it is a step, before the forward pass."
            )

    def check_not_inside(self, what: str) -> None:
        """Raise RuntimeError within ``averaged_parameters()``."""
        if self.swapped == "averaged_parameters()":
            raise RuntimeError(
                f"{what} inside averaged_parameters(): the weights are their averages, and not those that the states "
                "belong to. Leave it first."
            )

    def _captured_on(self) -> list[torch.device]:
        """The devices of the parameters whose work is being recorded into a graph now."""
        plan = self.plan
        devices = dict.fromkeys(p.device for p in self.params) if plan is None else plan.devices
        return [device for device in devices if capturing(device)]

    def _update(self, gradients: list[Tensor | None]) -> None:
        if self.repeats:
            self.plan = None  # made for the parameter once
        self.forget_probe()
        optimizer, plan = self._optimizer, self.plan
        fresh = not optimizer.state
        sharded = plan.sharded if plan is not None else any(map(is_sharded, self.params))
        if sharded:
            # Once a step and in the order of the parameters: it communicates, and every rank must do it alike.
            placements = plan.placements if plan is not None else list(map(placements_of, self.params))
            gradients = local_gradients(self.params, gradients, placements)
        bind = plan is not None and plan.bind(gradients)
        if not bind and any(g is not None and g.is_sparse for g in gradients):
            gradients = without_needless_sparsity(optimizer, gradients)
            bind = plan is not None and plan.bind(gradients)
        if plan is None or not bind:
            if sharded and not (fresh and self.probe.is_made_by(optimizer, gradients)):
                self._agreement.check(optimizer, self.params, gradients)
            plan = self.plan = self._new_plan(gradients)
            check_fits(plan, gradients)
        if fresh and optimizer.state and self.probe.is_made_by(optimizer, gradients):
            self._note_probe()
            return
        self._run(plan)
        if any(capturing(bucket.key.device) for bucket in plan.buckets):
            self._captured.append(plan)  # a replay uses its memory
            self.hyperparameters.captured = True

    def _new_plan(self, gradients: list[Tensor | None]) -> Plan:
        return Plan(self._optimizer, self.failed, self.params, gradients, self.plan, self.repeats)

    def _run(self, plan: Plan) -> None:
        optimizer = self._optimizer
        scaling = scaling_of(optimizer)
        limited = scaling is not None and scaling.max_norm is not None
        if limited and not self.limited:
            check_norm_is_whole(optimizer, self.params)
        self.stats, self.limited = plan.step(scaling), limited

    # Steps that only make the states.

    def _note_probe(self) -> None:
        self.plan = None
        self.probe.note(self._optimizer)

    def forget_probe(self) -> None:
        """Undo what a probe did."""
        if self.probe:
            self.probe.undo(self._optimizer)
            self.plan, self._plans_of_one = None, {}

    def probe_again(self) -> None:
        """Make the states of a probe anew, of the weights and options that there are now."""
        if not self.probe:
            return
        self.take_params()
        again = self.probe.gradients(self._optimizer, self.params)
        self.forget_probe()
        with torch.no_grad():
            self._new_plan(again)
        self._note_probe()

    # Captured steps, and the first.

    def push_hyperparameters(self) -> None:
        """See :meth:`RuleOptimizer.push_hyperparameters`."""
        if self._captured:
            check_captured(self._optimizer, self._captured[-1])
        self.read_groups()
        self.hyperparameters.push()

    @torch.no_grad()
    def warm_up(self) -> None:
        """See :meth:`RuleOptimizer.warmup`."""
        self.read_groups()
        warm_up(self._optimizer, self.failed)


def check_fits(plan: Plan, gradients: Any) -> None:
    """Raise RuntimeError where a new plan does not fit."""
    if not plan.bind(gradients):
        raise RuntimeError("a parameter or state changed during the step. Let no other thread write them.")
