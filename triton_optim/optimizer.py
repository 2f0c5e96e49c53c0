"""The base of every optimizer: torch.optim.Optimizer's contract around a rule."""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from itertools import chain
from operator import is_, itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from typing_extensions import Unpack

from . import compile_ahead, opaque
from .averaging import averaged_parameters, check_averaging, initial_average
from .bucket import Key
from .checkpoint import as_saved, check_keys, fill_in, held_state, held_states, restore_dtypes, saved_state
from .codecs import (
    AVERAGE,
    COUNT,
    PRECISION,
    Codec,
    averages,
    check_names,
    check_precision,
    new_parts,
    part_names,
    rounds,
    state_codec,
)
from .dispatch import BACKENDS, choose, this_machine
from .gradient_norm import Scaling, Signal
from .gradient_release import GradientRelease, check_alone
from .hyperparameters import GroupValues, plain_group, unread
from .kernels.straight import check_signature, straight
from .layout import is_sharded, local, local_gradient, local_gradients, placements_of
from .on_device import OnDevice, capturing
from .options import OPTIONS, OptimizerSignature, Options, check_known, check_options, describe_options
from .plan import Plan, PlanOfOne, check_captured, request_for, warm_up
from .rows import counted_dtype
from .state import are_contents, contents, watch


class Variant(NamedTuple):
    """One way an optimizer can run: a rule and the names of the states it takes, in the rule's order."""

    rule: Any
    state_names: tuple[str, ...]
    prologue: bool = False  # the gradients go through RuleOptimizer.prologue first
    averaged: bool = False  # the last state is the average of the parameter, which no rule takes


def with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``step`` as torch wraps it: hooks before and after it, and a range for the profiler. Without any of them
    torch's wrapper would take longer than the step of a small model, so that it is left out.
    """
    hooked = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: RuleOptimizer, *args: Any, **kwargs: Any) -> Any:
        if type(self).step is not wrapper:  # a subclass's own, which torch has wrapped, and which called this one
            return step(self, *args, **kwargs)
        if (
            torch.compiler.is_compiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        ):
            return hooked(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch wraps it no more
    return wrapper


def ordered(params: Any) -> Any:
    """The parameters as they are; a set as a list, with the warning that torch has for it from 2.15 on. It points at
    the line that made the optimizer: what Dynamo and the classes lay around their constructors differs.
    """
    if not isinstance(params, (set, frozenset)):
        return params
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in (__package__, "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"optimizer parameters need to be organized in ordered collections, got a {type(params).__name__}: its order, "
        "and with it a state dict's, changes from run to run. Give a list.",
        FutureWarning,
        stacklevel=level,
    )
    return list(params)


def leave_to_python(cls: type[Optimizer], *methods: str) -> None:
    """Let no compiled function trace these methods of a class. Of a constructor Dynamo leaves torch's part to Python,
    and what was set before it would then be set on no object.
    """
    for name in methods:
        if name in cls.__dict__:
            setattr(cls, name, _disable_dynamo(cls.__dict__[name]))


class RuleOptimizer(Optimizer):
    r"""An optimizer from a rule: subclass it with ``rule``, ``state_names`` and :meth:`scalars`.

    The rule is a ``@jit`` function ``rule(p, g, *states, h) -> (p, *states)`` on values, of which each element is
    updated on its own. ``h`` is what :meth:`scalars` returns, formed on the host in float64. Arithmetic is float32
    (float64 for float64 parameters), however the values are stored. What is not in the language of rules
    (kernels/language.py) is refused when an optimizer is made.

    Class attributes:
        rule: the update.
        state_names: names of the rule's states, in its order; each is a tensor like its parameter, zero at first.
        counts_steps: whether the state holds ``step``, a 0-dim float32 tensor (on the parameter's device when
            ``capturable``, else on the CPU); float64 where something is rounded stochastically, as float32 counts to
            2^24.
        counts_on_device: whether ``step`` and what else is carried are on the parameter's device always.
        takes_dense_gradients: False for an optimizer that is for sparse gradients only.
        step_is_tensor: False keeps ``step`` as an int.
        prologue_names: names of the states that :meth:`prologue` keeps.
        nonnegative: names of the states that are never negative, such as second moments: their codes have no sign.
        never_quantized: names of the states that are float32 where `state_dtype` asks for codes, such as weights.
        option_names: the options that every parameter group carries, whatever their value.

    Args:
        params: parameters, named parameters or parameter groups, as in torch.optim.
        defaults: the hyperparameters of a group.
        options: see :class:`Options`.

    Raises:
        ValueError: `backend` or `amp` is unknown, or torch's own checks of `params` fail.
        TypeError: an option is unknown, or `params` is a tensor.
        RuleError: a TypeError: a rule is not of the language of rules, or has other states than ``state_names``.
        RuntimeError: the options exclude each other, or the pinned backend cannot run these parameters here.
    """

    rule: ClassVar[Any] = None
    state_names: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = True
    counts_on_device: ClassVar[bool] = False
    takes_dense_gradients: ClassVar[bool] = True
    step_is_tensor: ClassVar[bool] = True
    prologue_names: ClassVar[tuple[str, ...]] = ()
    nonnegative: ClassVar[tuple[str, ...]] = ()
    never_quantized: ClassVar[tuple[str, ...]] = ()
    option_names: ClassVar[tuple[str, ...]] = ("maximize", "foreach", "capturable", "differentiable", "fused")
    variants: ClassVar[tuple[Variant, ...]] = ()
    __signature__ = OptimizerSignature()

    # What a gradient scaler sets for the time of a step.
    grad_scale: Any
    found_inf: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        leave_to_python(cls, "__init__")
        if cls.rule is not None and "variants" not in cls.__dict__:
            prologue = cls.prologue is not RuleOptimizer.prologue
            cls.variants = (Variant(cls.rule, cls.state_names, prologue),)
        check_names(cls)
        describe_options(cls)

    @_disable_dynamo
    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        **options: Unpack[Options],
    ) -> None:
        check_known(type(self), options)
        carried: dict[str, Any] = {**OPTIONS, **options}
        backend, amp, max_grad_norm = (carried.pop(name) for name in ("backend", "amp", "max_grad_norm"))
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f'Invalid backend: {backend!r}. Use "auto", ' + ", ".join(f'"{b}"' for b in BACKENDS))
        if amp not in (None, "fused"):
            raise ValueError(f'Invalid amp: {amp!r}. Use "fused", or None to leave scaling to the scaler.')
        self.check_hyperparameters(defaults)
        check_options(carried)
        self._release: GradientRelease | None = None
        self.backend, self.amp, self.max_grad_norm = backend, amp, max_grad_norm
        self.failed: dict[Key, Key] = {}  # buckets whose backend failed, and what they became
        self._signal: Signal | None = None  # of the last step
        self._limited = False  # whether it limited the norm
        self._swapped = False
        self._on_device: dict[torch.device, OnDevice] = {}
        self._captured: list[Plan] = []
        self._flat: list[Tensor] = []  # the parameters
        self._sizes: list[int] = []  # how many of them each group has
        self.group_values: list[GroupValues] = []
        self._repeats = False  # whether one of them is there twice
        self._probed: dict[Tensor, list[Any]] = {}  # parameters whose states a probe made, and these
        self._plan: Plan | None = None
        self._plans_of_one: dict[int, PlanOfOne] = {}  # with gradient release
        self._handle = opaque.register(self)
        carried = {name: v for name, v in carried.items() if name in self.option_names or v != OPTIONS[name]}
        super().__init__(ordered(params), defaults | carried)
        watch(self)

    @property
    def max_grad_norm(self) -> float | None:
        """The largest norm of all gradients together; None for any. It may be set at any time, except while gradients
        are released in backward.
        """
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"Invalid max_grad_norm: {value}. It must be positive, or None not to clip.")
        if self._release is not None:
            check_alone(type(self).__name__, value, self.amp)
        self._max_grad_norm = None if value is None else float(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the gradients of the last step, 0-dim, on the device; None where ``max_grad_norm`` was None."""
        return self._signal.tensor[2] if self._signal is not None and self._limited else None

    @property
    def skipped(self) -> Tensor | None:
        """Whether the last step was skipped, 1 or 0; 0-dim, on the device. None of a step that could not be."""
        return None if self._signal is None else self._signal.tensor[1]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's scaler asks. Where gradients are released it is to call ``step``, too, which refuses it."""
        return self.amp is not None or self._release is not None

    @property
    def scales_gradients(self) -> bool:
        """Whether a step may multiply all gradients by a factor."""
        return self.amp is not None or self.max_grad_norm is not None

    # What a subclass says.

    def scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """The rule's ``h``: a NamedTuple of numbers.

        Args:
            group: the parameter group; 1-element tensors on the CPU have become floats. A hyperparameter on a device
                stays a 0-dim float64 tensor, so write arithmetic that works for both (``**``, not ``math.pow``). With
                ``capturable``, and ``amp="fused"`` where Triton runs the rule, all numbers are such tensors. What is
                done to them is then recorded, and one launch does it again in every step: arithmetic, comparisons,
                ``torch.where``, ``minimum``, ``maximum``, ``clamp``, ``sqrt``, ``exp``, ``log``, ``abs``, ``floor``. Of
                all else each operation is a launch.
                Of a method that reads its arguments alone it is recorded anew only where a hyperparameter that is no
                number has changed. One that reads anything else, be it an attribute of the optimizer, a dict or a
                number of the module, is recorded in every step, which takes the host longer. Replays of a captured
                graph see of all this what it was when the step was captured.
            step: number of this update, from 1; a 0-dim float64 tensor when ``capturable``. Where ``counts_steps`` is
                False it is 1 for a parameter without the rule's states and more ever after, whatever else is kept.

        An optimizer that carries numbers is given them too, by name: what :meth:`start_carried` or the last
        :meth:`carry` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method scalars(group, step)")

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter of `group` is out of range. It is asked in the constructor, and in a
        step that finds one changed; then what a tensor on a device holds is not known, and in every range.
        """

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant a group runs, one of ``variants``."""
        return self.variants[0]

    def start_carried(self, group: dict[str, Any]) -> dict[str, float]:
        """Numbers that a parameter's state carries from step to step beside ``step``, as they are before the first.

        Each is kept as a 0-dim tensor under its name: float32, or float64 where that is torch's default dtype.
        """
        return {}

    def carry(self, group: dict[str, Any], step: Any, **carried: Any) -> dict[str, Any]:
        """The carried numbers after update number `step`; arguments as of :meth:`scalars`."""
        return carried

    def initial_state(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        """A state before the first step: a new tensor like the parameter."""
        return torch.zeros_like(p, memory_format=torch.preserve_format)

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        """What the rule takes in place of the gradients: for updates of which an element needs more than its own
        gradient, such as a norm, a row or a whole matrix. A subclass that writes this method has it called.

        It runs before the rule, once a step for the parameters of a group that were counted alike.

        Args:
            group: the parameter group, as :meth:`scalars` gets it.
            h: what :meth:`scalars` returned.
            params: the parameters, outside autograd (unless ``differentiable``); sharded ones are DTensors.
            gradients: theirs, negated where the group maximizes. Neither is to be written.
            states: a parameter's states by name, those of :meth:`prologue_state` among them; these are written in
                place, the rule's are the rule's.

        Returns:
            A tensor of its shape for each parameter, sharded where it is; kept in the gradient's dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prologue")

    def prologue_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """New states that :meth:`prologue` keeps for a parameter, as they are before the first step; of any shapes."""
        return {}

    def sparse_gradients(self, group: dict[str, Any]) -> str:
        """What becomes of a sparse gradient: ``"rows"``: the elements that it holds are updated, and no others.
        ``"dense"``: it is made dense first. Anything else: it is refused, and this says why.
        """
        return "its update moves elements whose gradient is 0"

    def make_states(self, group: dict[str, Any]) -> None:
        """Give the parameters of a group their states before their first step."""
        counted = {"step": 0} if "step" in self.counted_names(group) else {}
        for p in group["params"]:
            if is_lazy(p):  # the first step makes them
                continue
            started = counted | self.started(group)
            device = p.device if group.get("capturable") or self.counts_on_device else torch.device("cpu")
            for name, value in started.items():
                dtype = counted_dtype(group, name)
                self.state[p][name] = torch.tensor(float(value), dtype=dtype, device=device)
            for name in self.running_variant(group).state_names:
                self.state[p] |= self.new_state(name, p, group, state_codec(self, group, name, p))
            self.state[p] |= self.prologue_state(p, group)

    def new_state(self, name: str, p: Tensor, group: dict[str, Any], codec: Codec) -> dict[str, Tensor]:
        """The initial state as `codec` keeps it: its parts by name."""
        parts = new_parts(codec, self.first_state(name, p, group, codec))
        return dict(zip((name, *part_names(codec, name)), parts, strict=True))

    def first_state(self, name: str, p: Tensor, group: dict[str, Any], codec: Codec) -> Tensor:
        """A state or average before the first step."""
        if name == AVERAGE:
            return initial_average(self.state[p], p, codec)
        return self.initial_state(name, p, group)

    def running_variant(self, group: dict[str, Any]) -> Variant:
        """What a group runs: its variant, and the average of its parameters where one is kept."""
        variant = self.variant(group)
        variant = variant._replace(rule=straight(variant.rule))
        if averages(group):
            variant = variant._replace(state_names=(*variant.state_names, AVERAGE), averaged=True)
        return variant

    def started(self, group: dict[str, Any]) -> dict[str, float]:
        """What else than ``step`` is carried, as it is before the first step."""
        # Asked of every parameter: of an optimizer that carries nothing, no group is read for it.
        nothing = type(self).start_carried is RuleOptimizer.start_carried
        own = {} if nothing else self.start_carried(plain_group(group))
        return own | ({COUNT: 0.0} if averages(group) else {})

    def counted_names(self, group: dict[str, Any]) -> list[str]:
        """The states of a group that are numbers: ``step`` if it is kept, and what else is carried."""
        may_skip_the_first = self.amp is not None and bool(self.variant(group).state_names)
        counts = self.counts_steps or rounds(group) or may_skip_the_first
        return ["step"] * counts + list(self.started(group))

    # torch.optim.Optimizer's contract.

    @with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse where that has no meaning, or differs from its parameter in shape or
                device. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            opaque.traced_step(self)
            return loss
        if self._release is not None:
            told = [self.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
            if any(value is not None for value in told):
                raise RuntimeError(
                    f"{type(self).__name__}: a gradient scaler can't step gradients that were released in backward. "
                    "Use bfloat16, which needs none, or remove() the handle of gradient release."
                )
            self._release.step()
        else:
            self.update()
        return loss

    # A scheduler wraps `step` to note that it was called, in a file that Dynamo refuses to trace. `update` notes
    # it instead, which leaves `torch.compile(optimizer.step, fullgraph=True)` whole.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def update(self, given: list[Tensor | None] | None = None) -> None:
        """Apply one step.

        Args:
            given: the gradients, one for each parameter in the order of the groups; None skips a parameter. Left out,
                those that the parameters have.
        """
        self._check_not_swapped()
        self.read_groups()
        self._opt_called = True
        plan = None if given is not None or self._repeats or self._capturing() else self._plan
        if plan is not None and plan.gather():
            recording = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)  # the context manager takes as long as the launch
            try:
                self._run(plan)
            finally:
                torch._C._set_grad_enabled(recording)
            return
        self._take_flat()
        gradients = [p.grad for p in self._flat] if given is None else given
        self._check_capture(gradients)
        recording = any(group.get("differentiable") for group in self.param_groups)
        with nullcontext() if recording and torch.is_grad_enabled() else torch.no_grad():
            for own in self._rounds(gradients):
                self._update(own)
        if given is None and self._plan is not None and not self._repeats:
            self._plan.note_gradients()

    def _take_flat(self) -> None:
        """Take note of the parameters that there are. Where they are others than before, or those of other groups, all
        that was made for them is dropped.
        """
        lists = list(map(itemgetter("params"), self.param_groups))
        flat, sizes = list(chain.from_iterable(lists)), list(map(len, lists))
        if sizes == self._sizes and all(map(is_, flat, self._flat)):
            return
        repeats = len(set(map(id, flat))) < len(flat)
        if self._release is not None:
            self._release.follow(flat, repeats)
        self._flat, self._sizes, self._repeats = flat, sizes, repeats
        self._plan, self._plans_of_one = None, {}

    def _capturing(self) -> bool:
        return bool(self._flat) and capturing(self._flat[0].device)

    def _check_capture(self, gradients: list[Tensor | None]) -> None:
        """Raise RuntimeError where a step that is being captured would not be right when it is replayed."""
        if not self._capturing():
            return
        name = type(self).__name__
        if not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                f"{name}: a captured step reads its numbers on the device. Make the optimizer with capturable=True."
            )
        for i, (p, g) in enumerate(zip(self._flat, gradients, strict=True)):
            if p.requires_grad and g is None:
                raise RuntimeError(
                    f"{name}: parameter {i} requires a gradient and has none while a graph is captured; replays would "
                    "never update it. Capture backward with the step, or give it a gradient before."
                )

    def read_groups(self) -> None:
        """Take note of the hyperparameters as they are now, once a step: in ``group_values``. What the constructor
        would refuse raises, in every step that finds it.
        """
        groups, values = self.param_groups, self.group_values
        if len(values) != len(groups):
            values = self.group_values = [GroupValues() for _ in groups]
        for own, group in zip(values, groups, strict=True):
            own.read(group, self._check_edited)

    def _check_edited(self, group: dict[str, Any], more: bool) -> None:
        """Raise where a group has come to hold what the constructor refuses.

        Args:
            more: whether more than the values of numbers changed.
        """
        if more:
            self._check_group(group)
        else:
            self.check_hyperparameters(unread(group))
            check_averaging(self, unread(group))

    def on_device(self, device: torch.device) -> OnDevice:
        """The hyperparameters in the memory of `device`, up to date."""
        if device not in self._on_device:
            self._on_device[device] = OnDevice(self, device)
        self._on_device[device].push()
        return self._on_device[device]

    @torch.no_grad()
    def warmup(self) -> None:
        """Compile all that the first step will need, without stepping: no parameter or state changes, none is made.

        Gradients that are not there yet are taken to be like their parameters. What fails to compile runs eagerly in
        the first step, as ever, with a warning now.

        Example:
            >>> import torch, triton_optim
            >>> model = torch.nn.Linear(64, 64)
            >>> optimizer = triton_optim.AdamW(model.parameters(), max_grad_norm=1.0)
            >>> optimizer.warmup()
            >>> len(optimizer.state)
            0
        """
        self.read_groups()
        warm_up(self)

    def push_hyperparameters(self) -> None:
        """Bring the hyperparameters to the device, where captured steps read them: call it before a replay.

        A step of ``capturable=True`` that is captured into a CUDA graph reads learning rate, weight decay, betas and
        all other numbers of the parameter groups, the seed and `max_grad_norm` in device memory. After a scheduler or
        you changed one, this copies them there, without waiting for the device. Numbers that are device tensors
        themselves need no push, and no ordinary step needs one.

        Raises:
            RuntimeError: the parameters or groups are not those of the last step that was captured.
        """
        if self._captured:
            check_captured(self, self._captured[-1])
        self.read_groups()
        for held in self._on_device.values():
            held.push()

    def update_one(self, place: int, g: Tensor | None) -> None:
        """Apply a step of the parameter number `place` alone, with this gradient."""
        self._check_not_swapped()
        if self._probed:
            self._forget_probe()
        self.read_groups()
        p = self._flat[place]
        with torch.no_grad():
            gradients = {place: None if g is None else local_gradient(p, g)}
            plan = self._plans_of_one.get(place)
            if plan is None or not plan.fits(gradients):
                plan = self._plans_of_one[place] = PlanOfOne(self, self._flat, gradients, place=place)
                if not plan.fits(gradients):
                    raise RuntimeError("a parameter or state changed during the step. Let no other thread write them.")
            plan.step()

    def _check_not_swapped(self, what: str = "step") -> None:
        if self._swapped:
            raise RuntimeError(
                f"{what} inside averaged_parameters(): the weights are their averages, and not those that the states "
                "belong to. Leave it first."
            )

    def _rounds(self, gradients: list[Tensor | None]) -> list[list[Tensor | None]]:
        """The gradients as they are; where a parameter is listed k times, as torch warns not to do, k steps of them."""
        if not self._repeats:
            return [gradients]
        seen: dict[int, int] = {}
        turns = []
        for p in self._flat:
            turns.append(seen.get(id(p), 0))
            seen[id(p)] = turns[-1] + 1
        return [
            [g if turn == now else None for g, turn in zip(gradients, turns, strict=True)]
            for now in range(max(turns) + 1)
        ]

    def _update(self, gradients: list[Tensor | None]) -> None:
        if self._repeats:
            self._plan = None  # made for one of the parameter's places
        if self._probed:
            self._forget_probe()
        fresh, plan = not self.state, self._plan
        if plan.sharded if plan is not None else any(map(is_sharded, self._flat)):
            # Once a step and in the order of the parameters: it communicates, and every rank must do it alike.
            placed = plan.placements if plan is not None else list(map(placements_of, self._flat))
            gradients = local_gradients(self._flat, gradients, placed)
        fits = plan is not None and plan.fits(gradients)
        if not fits and any(g is not None and g.is_sparse for g in gradients):
            gradients = self._without_needless_sparsity(gradients)
            fits = plan is not None and plan.fits(gradients)
        if plan is None or not fits:
            plan = self._plan = Plan(self, self._flat, gradients, previous=self._plan)
            if not plan.fits(gradients):
                raise RuntimeError("a parameter or state changed during the step. Let no other thread write them.")
        if fresh and self.state and self._is_probed(gradients):
            self._note_probe()
            return
        self._run(plan)
        if any(capturing(bucket.key.device) for bucket in plan.buckets):
            self._captured.append(plan)  # a replay uses its memory

    def _run(self, plan: Plan) -> None:
        self._signal = plan.step(self.scaling())
        self._limited = self._max_grad_norm is not None

    def scaling(self) -> Scaling | None:
        """What this step does with all gradients; None where that is nothing."""
        grad_scale = found_inf = None
        if self.amp is not None:
            # Of no gradients at all torch's scaler says 0, no tensor.
            told = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            grad_scale, found_inf = (t if isinstance(t, Tensor) else None for t in told)
        looks = grad_scale is not None or found_inf is not None
        if not looks and self.max_grad_norm is None:
            return None
        return Scaling(grad_scale, found_inf, looks, self.max_grad_norm)

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """Within it, the parameters are their averages (``ema_decay``): for evaluation, or to save the model.

        Parameters that were not updated yet stay as they are. On leaving, the weights are back, bit for bit; they are
        kept meanwhile in as much memory as they take. The optimizer is saved, loaded and copied outside: training would
        go on from averages, with states that are not theirs.

        Raises:
            RuntimeError: nothing is averaged, it is entered already, or a step is made within it, or the optimizer
                saved, loaded or copied.

        Example:
            >>> import torch, triton_optim
            >>> p = torch.nn.Parameter(torch.zeros(1))
            >>> optimizer = triton_optim.SGD([p], lr=1.0, ema_decay=0.5, backend="eager")
            >>> for _ in range(2):
            ...     p.grad = torch.ones(1)
            ...     optimizer.step()
            >>> with optimizer.averaged_parameters():
            ...     print(p.item())
            -1.5
            >>> p.item()
            -2.0
        """
        return averaged_parameters(self)

    def _without_needless_sparsity(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        groups = [group for group in self.param_groups for _ in group["params"]]
        return [
            g.to_dense() if g is not None and g.is_sparse and self._wants_dense(group) else g
            for g, group in zip(gradients, groups, strict=True)
        ]

    def _wants_dense(self, group: dict[str, Any]) -> bool:
        # The other backends have no way to run single rows.
        rows = self.backend in ("auto", "eager") or not self.takes_dense_gradients
        kind = self.sparse_gradients(group)
        return kind == "dense" or (kind == "rows" and not rows)

    def _is_probed(self, gradients: list[Tensor | None]) -> bool:
        """Whether a first step is only made to see the states: torch.distributed.checkpoint makes one of a fresh
        optimizer, with a learning rate of 0 and gradients of 0. It must not count.
        """
        rates = [group.get("lr") for group in self.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return False  # the host does not wait for it
        return all(rate is not None and rate == 0 for rate in rates) and not any(
            (g._values() if g.is_sparse else g).any() for g in gradients if g is not None
        )

    def _note_probe(self) -> None:
        """Take note that the states that there are were made for a probe: they are of weights that may yet be loaded,
        and of options that may yet change.
        """
        self._plan = None
        self._probed = {p: contents(state) for p, state in self.state.items()}

    def _still_probed(self) -> list[Tensor]:
        """The parameters whose states are as a probe made them."""
        states = self.state
        return [p for p, made in self._probed.items() if p in states and are_contents(states[p], made)]

    def _forget_probe(self) -> None:
        """Undo what a probe did."""
        if not self._probed:
            return
        for p in self._still_probed():
            del self.state[p]
        self._probed, self._plan, self._plans_of_one = {}, None, {}

    def _probe_again(self) -> None:
        """Make the states of a probe anew, of the weights and options that there are now."""
        self._take_flat()
        again = self._still_probed()
        self._forget_probe()
        own = {id(p) for p in again}
        with torch.no_grad():
            Plan(self, self._flat, [torch.zeros_like(local(p)) if id(p) in own else None for p in self._flat])
        self._note_probe()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients: to None, or to zero in place. Unlike torch's, it is traced by ``torch.compile``."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        groups = opaque.groups_of(self) if torch.compiler.is_compiling() else self.param_groups
        for group in groups:
            for p in group["params"]:
                p.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.optim, checking that a pinned backend can run it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            self._take_flat()
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        numbers = unread(group)
        self.check_hyperparameters(numbers)
        check_options(group)
        for variant in (*self.variants, self.variant(group)):
            check_signature(straight(variant.rule), len(variant.state_names))
        check_precision(self, group)
        check_averaging(self, numbers)
        for i, p in enumerate(group["params"]):
            self.check_parameter(i, p, group)
            if is_lazy(p):
                continue
            choice = choose(request_for(self, group, p), this_machine())
            if choice.backend == "triton" and not this_machine().interpreter:
                compile_ahead.begin()

    def check_parameter(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        """Raise where parameter number `index` of a group is of a kind that the optimizer cannot update."""
        if not (p.is_floating_point() or p.is_complex()):
            raise RuntimeError(
                f"parameter {index} is {p.dtype} on {p.device}; {type(self).__name__} optimizes floating-point and "
                "complex tensors. Leave it out of params."
            )

    def state_dict(self) -> dict[str, Any]:
        """The state as in torch.optim. Steps that share memory are handed out as tensors of their own.

        A state in codes is a dict of them, their scales and how they are read, which torch.optim cannot take for a
        tensor: its step raises. It can have :func:`to_torch_state_dict`.
        """
        self._check_not_swapped("state_dict()")
        if self._probed:
            self._probe_again()
        handle = self.register_state_dict_post_hook(as_saved, prepend=True)  # type: ignore[arg-type]
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of torch.optim's.

        Unlike torch's, it keeps the dtype in which each state was saved: torch casts all but ``step`` to the
        parameter's, and float32 moments of bfloat16 parameters would be lost.

        Raises:
            TypeError: it is no dict.
            ValueError: it is that of another library (:func:`convert_state_dict` takes some), or its
                groups, or the names of its states, are not those of this optimizer, or a state lacks some.
            KeyError: it lacks its groups or states, or a group a hyperparameter.
            RuntimeError: a state is not of its parameter's shape or kind, or in codes that can't be read. In all cases
                nothing was changed.
        """
        self._check_not_swapped("load_state_dict()")
        if not isinstance(state_dict, Mapping):  # a hook may bring what its keys lack
            check_keys(state_dict)
        loaded: dict[str, Any] = {}

        def keep(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            states = held_states(self, state_dict)
            # How values are kept is this optimizer's own: the next step brings what is loaded into it.
            groups = [
                {name: own[name] for name in ("seed", "ema_decay", "ema_warmup") if name in own}
                | {name: value for name, value in saved.items() if name not in PRECISION}
                | {name: own[name] for name in PRECISION if name in own}
                for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
            ]
            loaded.update(state_dict, param_groups=groups, state=states)
            return dict(loaded)

        def restore(_: Optimizer) -> None:
            restore_dtypes(self, loaded)

        handles = [
            self.register_load_state_dict_pre_hook(keep),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        if self._release is not None:
            self._release.restart()

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_swapped("a copy")
        probed = set(map(id, self._still_probed()))
        states = {p: saved_state(self, state, p) for p, state in self.state.items() if id(p) not in probed}
        kept = ("defaults", "param_groups", "backend", "amp", "_max_grad_norm")
        return {name: getattr(self, name) for name in kept} | {"state": defaultdict(dict, states)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        params = chain.from_iterable(group["params"] for group in state["param_groups"])
        states = {p: held_state(self, i, p, state["state"][p]) for i, p in enumerate(params) if p in state["state"]}
        super().__setstate__(state | {"state": defaultdict(dict, {**state["state"], **states})})
        watch(self)
        # A copy has none of these; who loads a state dict keeps them.
        absent = {"backend": "auto", "amp": None, "_max_grad_norm": None, "_swapped": False, "_release": None}
        for name, value in absent.items():
            self.__dict__.setdefault(name, value)
        self.__dict__.setdefault("_on_device", {})
        self.__dict__.setdefault("failed", {})
        self.__dict__.setdefault("_captured", [])
        self._signal, self._limited, self._probed = None, False, {}
        self.group_values, self._plan, self._plans_of_one = [], None, {}
        self._flat, self._sizes, self._repeats = [], [], False
        self._take_flat()
        if "_handle" not in self.__dict__:
            self._handle = opaque.register(self)
        fill_in(self)


def filled_like(p: Tensor, value: float) -> Tensor:
    """A tensor like the parameter, full of `value`; of a complex parameter both parts are."""
    value = float(value)
    fill = complex(value, value) if p.is_complex() else value
    return torch.full_like(p, fill, memory_format=torch.preserve_format)


# Of what torch's message about tensors calls by the argument, as `check_range` is told it.
_ARGUMENTS = {
    "learning rate": "lr",
    "beta parameter at index 0": "betas[0]",
    "beta parameter at index 1": "betas[1]",
}


def check_range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise torch's ValueError unless low <= value < high.

    Args:
        name: as torch spells it in its message, such as ``"learning rate"``.
        value: a number or a 1-element tensor.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        shape = tuple(value.shape)
        argument = _ARGUMENTS.get(name, name.removesuffix(" value"))
        raise ValueError(f"Tensor {argument} must be 1-element, got shape {shape}. Use groups to give each its own.")
    if not low <= value or not value < high:
        bounds = f"at least {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        raise ValueError(f"Invalid {name}: {value}. It must be {bounds}.")
