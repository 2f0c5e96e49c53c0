"""The declaration of an update: its rule, its states, its scalars and what comes before the rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .kernels.straight import straight
from .util.hyperparameters import Hyperparameters, plain_group

# The states of the exponential moving average of the weights: the average, how many values it is of, and the weights
# themselves while the parameter is the average.
AVERAGE, COUNT, WEIGHTS = "ema", "n_averaged", "weights"


class State(NamedTuple):
    """A tensor that an optimizer keeps of each parameter.

    Attributes:
        name: its key in ``optimizer.state[p]``, and in checkpoints.
        start: what it is before the first step: a number, with which a tensor like the parameter is filled;
            ``"parameter"``, a copy of it, with what its rounding left where that is kept; or a function of a parameter
            and its group that returns either a number or a new tensor. Of one among ``kept_states`` the tensor may be
            of any shape, and it returns None for a parameter that has no such state.
        nonnegative: it is never negative, such as a second moment: its codes have no sign.
        quantized: False for what is kept in float32 where `state_dtype` asks for codes: weights, and what differs by
            orders of magnitude within a block, of which a code keeps little more than the largest.
    """

    name: str
    start: float | str | Callable[[Tensor, dict[str, Any]], Any] = 0.0
    nonnegative: bool = False
    quantized: bool = True


class Variant(NamedTuple):
    """One way an optimizer can run: a rule and the states it takes, in the rule's order."""

    rule: Any
    states: tuple[State, ...]
    prologue: bool = False  # the gradients go through Update.prologue first
    averaged: bool = False  # the last state is the average of the parameter, which no rule takes
    measure: Any = None  # what is summed over each parameter first, for Update.factors
    sampled: str | None = None  # in place of a measure: Update.sums of every group[sampled]-th element

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of the states, in the rule's order."""
        return tuple(state.name for state in self.states)

    @property
    def staged(self) -> bool:
        """Whether something else comes before the rule."""
        return self.prologue or self.measures

    @property
    def measures(self) -> bool:
        """Whether sums come before the rule."""
        return self.measure is not None or self.sampled is not None


class Measured(NamedTuple):
    """What :attr:`Update.measure` found of parameters of a group that were counted alike.

    Attributes:
        group: the parameter group, with numbers of the host, which replays of a captured step keep; `h` has what
            changes.
        h: what :meth:`Update.scalars` returned, with the scalars of :meth:`Update.kept_scalars`.
        params: the parameters.
        states: a parameter's states by name. Those of ``kept_states`` may be written in place.
        numel: how many elements each parameter has, of a sharded one all, and of a complex one both parts, as rules
            have it; float64 ``(n,)`` on the device.
        sums: what was summed, in the order in which ``measure`` returns it, each float64 ``(n,)`` on the device. Of a
            variant that samples, what :meth:`Update.sums` returned is at the first parameter, and 0 at the others.
        total: what :meth:`Update.total` returned.
    """

    group: dict[str, Any]
    h: Any
    params: list[Tensor]
    states: list[dict[str, Any]]
    numel: Tensor
    sums: tuple[Tensor, ...]
    total: Any = None


class Update:
    """What an optimizer declares of its update, and what every floor below it may read of the optimizer.

    Class attributes:
        rule: the update.
        measure: what is summed over each parameter before the rule runs: a ``@jit`` function of the rule's arguments
            that returns a tuple of values. :meth:`factors` makes scalars of the sums. It writes nothing.
        states: the rule's, each a :class:`State`, in its order; tensors like their parameter.
        kept_states: those that :meth:`prologue` or :meth:`factors` keeps. Where a prologue does, those whose start is
            no function are like their parameter, and ``state_dtype`` is for them, too.
        counts_steps: whether the state holds ``step``, a 0-dim float32 tensor (on the parameter's device when
            ``capturable``, else on the CPU); float64 where something has stochastic rounding, as float32 counts to
            2^24.
        counts_on_device: whether the scalar states are on the parameter's device always.
        takes_dense_gradients: False for an optimizer that is for sparse gradients only.
        step_is_tensor: False keeps ``step`` as an int.
        exact_scalar_states: names of the scalar states that are float64, such as sums of thousands of steps: what is
            added to one in float32 is rounded to a share of the sum.
        option_names: the options that every parameter group carries, whatever their value.
        group_names: what a group may say of its parameters, and keeps where a state dict that is loaded does not.
    """

    rule: ClassVar[Any] = None
    measure: ClassVar[Any] = None
    states: ClassVar[tuple[State, ...]] = ()
    kept_states: ClassVar[tuple[State, ...]] = ()
    counts_steps: ClassVar[bool] = True
    counts_on_device: ClassVar[bool] = False
    takes_dense_gradients: ClassVar[bool] = True
    step_is_tensor: ClassVar[bool] = True
    exact_scalar_states: ClassVar[tuple[str, ...]] = ()
    option_names: ClassVar[tuple[str, ...]] = ("maximize", "foreach", "capturable", "differentiable", "fused")
    group_names: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[Variant, ...]] = ()
    # Of those above: the states of all variants' rules by name, with those of `coded_names`, and the names of
    # kept_states.
    declared: ClassVar[dict[str, State]] = {}
    kept_names: ClassVar[tuple[str, ...]] = ()
    # Of these the ones of a prologue that are like their parameter: declared, too, and kept as `state_dtype` says.
    coded_names: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        param_groups: list[dict[str, Any]]
        state: defaultdict[Tensor, Any]
        defaults: dict[str, Any]
        backend: str
        amp: str | None
        _opt_called: bool  # which schedulers ask

        @property
        def max_grad_norm(self) -> float | None: ...

        @property
        def hyperparameters(self) -> Hyperparameters: ...

        def averaged_so_far(self) -> float: ...

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

        An optimizer with scalar states is given them too, by name: what :meth:`init_scalar_state` or the last
        :meth:`update_scalar_state` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method scalars(group, step)")

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter of `group` is out of range. It is asked in the constructor, and in a
        step that finds one changed; then what a tensor on a device holds is not known, and in every range.
        """

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant a group runs, one of ``variants``."""
        return self.variants[0]

    def init_scalar_state(self, group: dict[str, Any]) -> dict[str, float]:
        """Scalar states: numbers that a parameter has beside ``step``, as they are before the first step.

        Each is kept as a 0-dim tensor under its name: float32, or float64 where that is torch's default dtype or it is
        one of ``exact_scalar_states``.
        """
        return {}

    def update_scalar_state(self, group: dict[str, Any], step: Any, **scalar_state: Any) -> dict[str, Any]:
        """The scalar states after update number `step`; arguments as of :meth:`scalars`."""
        return scalar_state

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
            states: a parameter's states by name; those of ``kept_states`` are written in place, the rule's are the
                rule's. What ``state_dtype`` quantizes or keeps in bfloat16 is there in float32, and rounded afterwards.

        Returns:
            A tensor of its shape for each parameter, sharded where it is; kept in the gradient's dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prologue")

    def first_kept(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """New tensors of ``kept_states`` for a parameter, as they are before the first step."""
        first = {state.name: first_value(state, p, group) for state in self.kept_states}
        return {name: value for name, value in first.items() if value is not None}

    def kept_scalars(self, measured: Measured) -> dict[str, Any]:
        """The scalars that hang on what ``kept_states`` hold, such as a step size that the steps
        before have found. ``measure`` and the rule read them, and :meth:`factors` finds them in ``measured.h``.

        Args:
            measured: without sums.

        Returns:
            By the name of a field of the rule's scalars its value, a number or a 0-dim tensor on the device, which
            takes the place of the one that :meth:`scalars` returned. Nothing may wait for the device.
        """
        return {}

    def sums(self, measured: Measured, params: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
        """What a measure would sum, of every few elements: for sums that need not be over all, so that what is kept for
        them alone takes less memory. Of a variant with ``sampled`` it is asked in place of its ``measure``.

        Args:
            measured: without sums. States of ``kept_states`` may be written in place.
            params: the values of the sampled elements of all its parameters, one parameter after the other, as the
                rule would have them: of each, flattened, the first and every n-th after it, where n is the
                hyperparameter that ``sampled`` names.
            gradients: theirs, as the rule would have them.

        Returns:
            The sums over all these elements, each 0-dim.
        """
        raise NotImplementedError(f"{type(self).__name__} samples and needs a method sums(measured, params, gradients)")

    def factors(self, measured: Measured) -> dict[str, Any]:
        """The scalars that differ from parameter to parameter, of what ``measure`` summed: for updates of which an
        element needs norms, means or counts over its parameter.

        Arithmetic on the sums is torch's, in float64, without waiting for the device. It runs once a step for the
        parameters of a group that were counted alike.

        Returns:
            By the name of a field of the rule's scalars its values, ``(n,)``, which take the place of the one that
            :meth:`scalars` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} has a measure and needs a method factors(measured)")

    def total(self, measured: list[Measured]) -> Any:
        """What sums over the whole model come to, which :meth:`factors` is then given; asked once a step.

        Args:
            measured: of all parameters that have a gradient.
        """
        return None

    @property
    def needs_all(self) -> bool:
        """Whether a parameter's update depends on the gradients of others."""
        return type(self).total is not Update.total

    def sparse_gradients(self, group: dict[str, Any]) -> str:
        """What becomes of a sparse gradient: ``"rows"``: the elements that it holds are updated, and no others.
        ``"dense"``: it is made dense first. Anything else: it is refused, and this says why.
        """
        return "its update moves elements whose gradient is 0"

    def running_variant(self, group: dict[str, Any]) -> Variant:
        """What a group runs: its variant, and the average of its parameters where one is kept."""
        variant = self.variant(group)
        measure = variant.measure and straight(variant.measure)
        variant = variant._replace(rule=straight(variant.rule), measure=measure)
        if averages(group):
            variant = variant._replace(states=(*variant.states, State(AVERAGE)), averaged=True)
        return variant

    def first_scalar_states(self, group: dict[str, Any]) -> dict[str, float]:
        """The scalar states beside ``step``, as they are before the first step."""
        # Asked of every parameter: of an optimizer without them, no group is read for it.
        nothing = type(self).init_scalar_state is Update.init_scalar_state
        own = {} if nothing else self.init_scalar_state(plain_group(group))
        return own | ({COUNT: 0.0} if averages(group) else {})

    def scalar_state_names(self, group: dict[str, Any]) -> list[str]:
        """The states of a group that are numbers: its scalar states, ``step`` first if it is kept."""
        may_skip_the_first = self.amp is not None and bool(self.variant(group).state_names)
        counts = self.counts_steps or rounds(group) or may_skip_the_first
        return ["step"] * counts + list(self.first_scalar_states(group))

    @classmethod
    def is_nonnegative(cls, name: str) -> bool:
        """Whether a state is declared never to be negative."""
        return name in cls.declared and cls.declared[name].nonnegative

    @property
    def scales_gradients(self) -> bool:
        """Whether a step may multiply all gradients by a factor."""
        return self.amp is not None or self.max_grad_norm is not None


def first_value(state: State, p: Tensor, group: dict[str, Any], exact: Tensor | None = None) -> Any:
    """A state before the first step: a new tensor, or None where this parameter has none.

    Args:
        exact: the parameter with what its rounding left; by default the parameter.
    """
    start = state.start(p, group) if callable(state.start) else state.start
    if start is None or isinstance(start, Tensor):
        return start
    if isinstance(start, str):
        value = p if exact is None else exact
        value = value if group.get("differentiable") else value.detach()  # of one that autograd follows a function
        return value.clone(memory_format=torch.preserve_format)
    start = float(start)
    fill = complex(start, start) if p.is_complex() else start  # both parts
    return torch.full_like(p, fill, memory_format=torch.preserve_format)


def averages(group: dict[str, Any]) -> bool:
    """Whether a group's parameters are averaged."""
    return group.get("ema_decay") is not None


def offloads(group: dict[str, Any]) -> bool:
    """Whether a group's parameters are stepped on the host, where their states are."""
    return group.get("offload") is not None


def states_device(group: dict[str, Any], p: Tensor) -> torch.device:
    """Where the states of a parameter are, and its step is made."""
    return torch.device("cpu") if offloads(group) else p.device


def rounds(group: dict[str, Any]) -> bool:
    """Whether anything of a group may have stochastic rounding: then its steps are counted."""
    return (
        group.get("state_dtype") in (torch.bfloat16, "int4")
        or group.get("param_precision") in ("stochastic", "split24")
        or (averages(group) and group.get("ema_dtype") == torch.bfloat16)
    )
