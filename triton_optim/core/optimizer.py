"""The base of every optimizer: torch.optim.Optimizer's contract around a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from ..backends.cpp import build_ahead
from ..backends.triton import compile_ahead
from ..buckets.state import watch
from ..dispatch import BACKENDS, choose, this_machine
from ..engine import compile_op
from ..engine.engine import Engine
from ..engine.entries import request_for
from ..kernels.straight import check_signature, straight
from ..options import (
    OPTIONS,
    OptimizerSignature,
    Options,
    check_group_keys,
    check_known,
    check_options,
    describe_options,
    hold_dtypes,
)
from ..precision.averaging import check_averaging, largest_count
from ..precision.codecs import check_declared, check_precision, coded_states
from ..spec import Variant, offloads
from ..util.hyperparameters import Hyperparameters, compared, unread
from ..util.layout import first_of_each_dtype, first_of_each_kind
from .checks import check_alone, hold_numbers
from .evaluation import EvaluatedOptimizer
from .wrapping import check_param_group, is_compiling, leave_to_python, ordered, with_hooks


class RuleOptimizer(EvaluatedOptimizer):
    r"""An optimizer from a rule: subclass it with ``rule``, ``states`` and :meth:`scalars`.

    The rule is a ``@jit`` function ``rule(p, g, *states, h) -> (p, *states)`` on values, of which each element is
    updated on its own. ``h`` is what :meth:`scalars` returns, formed on the host in float64. Arithmetic is float32
    (float64 for float64 parameters), however the values are stored. What is not in the language of rules
    (kernels/language.py) is refused when an optimizer is made.

    What else it may declare: see :class:`triton_optim.spec.Update`.

    Args:
        params: parameters, named parameters or parameter groups, as in torch.optim.
        defaults: the hyperparameters of a group, and options, as torch's optimizers have them there.
        options: see :class:`Options`.

    Raises:
        ValueError: `backend` or `amp` is unknown, or torch's own checks of `params` fail.
        TypeError: an option is unknown, `params` is a tensor or no iterable, or a hyperparameter whose default is a
            number, or a tuple of numbers, is none; a tuple that is shorter or longer is an IndexError or a ValueError.
        KeyError: a group has no ``"params"``.
        RuleError: a TypeError: a rule is not of the language of rules, or has other states than ``states``.
        RuntimeError: the options exclude each other, or the pinned backend cannot run these parameters here.
    """

    __signature__ = OptimizerSignature()

    # What a gradient scaler sets for the time of a step.
    grad_scale: Any
    found_inf: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        leave_to_python(cls, "__init__")
        if cls.rule is not None and "variants" not in cls.__dict__:
            prologue = cls.prologue is not RuleOptimizer.prologue
            cls.variants = (Variant(cls.rule, cls.states, prologue, measure=cls.measure),)
        check_declared(cls)
        cls.declared = {state.name: state for variant in cls.variants for state in variant.states}
        cls.kept_names = tuple(state.name for state in cls.kept_states)
        coded = coded_states(cls)
        cls.coded_names = tuple(state.name for state in coded)
        cls.declared |= {state.name: state for state in coded}
        describe_options(cls)

    @_disable_dynamo
    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        check_known(type(self), options)
        carried: dict[str, Any] = {**OPTIONS, **{n: v for n, v in defaults.items() if n in OPTIONS}, **options}
        defaults = {name: value for name, value in defaults.items() if name not in OPTIONS}
        backend, amp, max_grad_norm = (carried.pop(name) for name in ("backend", "amp", "max_grad_norm"))
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f'Invalid backend: {backend!r}. Use "auto", ' + ", ".join(f'"{b}"' for b in BACKENDS))
        if amp not in (None, "fused"):
            raise ValueError(f'Invalid amp: {amp!r}. Use "fused", or None to leave scaling to the scaler.')
        hold_numbers(type(self), defaults)
        self.check_hyperparameters(defaults)
        hold_dtypes(carried)
        check_options(type(self), carried | defaults)
        self.engine = Engine(self, self._check_edited)
        self.backend, self.amp, self.max_grad_norm = backend, amp, max_grad_norm
        carried = {name: v for name, v in carried.items() if name in self.option_names or v != OPTIONS[name]}
        super().__init__(ordered(params), defaults | carried)
        watch(self)

    @property
    def max_grad_norm(self) -> float | None:
        """The largest norm of all gradients together; None for any. It may be set at any time, except while gradients
        are released in backward.
        """
        return self.engine.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and (value is True or not compared("max_grad_norm", value, lambda: value > 0)):
            raise ValueError(f"Invalid max_grad_norm: {value}. It must be a positive number, or None not to clip.")
        if self.engine.release is not None:
            check_alone(type(self).__name__, value, self.amp)
        self.engine.max_grad_norm = None if value is None else float(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the gradients of the last step, 0-dim, on the device; None where ``max_grad_norm`` was None."""
        engine = self.engine
        return engine.stats.norm if engine.stats is not None and engine.limited else None

    @property
    def skipped(self) -> Tensor | None:
        """Whether the last step was skipped, 1 or 0; 0-dim, on the device. None of a step that could not be."""
        return None if self.engine.stats is None else self.engine.stats.skip

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's scaler asks. Where gradients are released it is to call ``step``, too, which refuses it."""
        return self.amp is not None or self.engine.release is not None

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Those of all groups, as they were when a step last read them."""
        return self.engine.hyperparameters

    # torch.optim.Optimizer's contract.

    @with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            TypeError: `closure` is no function, such as a loss.
            RuntimeError: a gradient is sparse where that has no meaning, or differs from its parameter in shape or
                device. Nothing was changed.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"step takes a closure, a function that returns the loss; got {closure!r:.80}, of type "
                    f"{type(closure).__name__}. Call loss.backward(), then step() without it."
                )
            with torch.enable_grad():
                loss = closure()
        if is_compiling():
            compile_op.traced_step(self.engine, compile_op.groups_of(self))
        else:
            self.engine.step()
        return loss

    # A scheduler wraps `step` to note that it was called, in a file that Dynamo refuses to trace. The engine notes
    # it instead, which leaves `torch.compile(optimizer.step, fullgraph=True)` whole.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _check_edited(self, group: dict[str, Any], numbers: dict[str, Any] | None) -> None:
        """Raise where a group has come to hold what the constructor refuses; see GroupValues.read."""
        if numbers is None:
            self._check_group(group)
        else:
            self.check_hyperparameters(numbers)
            check_averaging(self, numbers)

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
        self.engine.warm_up()

    def push_hyperparameters(self) -> None:
        """Bring the hyperparameters to the device, where captured steps read them: call it before a replay.

        A step of ``capturable=True`` that is captured into a CUDA graph reads learning rate, weight decay, betas and
        all other numbers of the parameter groups, the seed and `max_grad_norm` in device memory. After a scheduler or
        you changed one, this copies them there, without waiting for the device. Numbers that are device tensors
        themselves need no push, and no ordinary step needs one.

        Raises:
            RuntimeError: the parameters or groups are not those of the last step that was captured.
        """
        self.engine.push_hyperparameters()

    def averaged_so_far(self) -> float:
        """Of how many values the averages are, which a parameter that is new to them joins."""
        # While gradients are released, some have been counted in this round already.
        release = self.engine.release
        return largest_count(self) if release is None else release.averaged

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients: to None, or to zero in place. Unlike torch's, it is traced by ``torch.compile``."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        groups = compile_op.groups_of(self) if is_compiling() else self.param_groups
        for group in groups:
            for p in group["params"]:
                p.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.optim, checking that a pinned backend can run it."""
        check_param_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            if self.engine.release is not None:  # else the next step finds the group
                self.engine.take_params()
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group_keys(self, group)
        hold_dtypes(group)
        hold_numbers(type(self), group)
        numbers = unread(group)
        self.check_hyperparameters(numbers)
        check_options(type(self), group)
        if offloads(group) and self.backend == "triton":
            raise RuntimeError('backend="triton" runs no step on the host, where offload="cpu" has it: leave one out.')
        if not self.variants:
            name = type(self).__name__
            raise TypeError(f"{name} has no rule. Set `rule = ...` in the class to a @jit function.")
        for variant in (*self.variants, self.variant(group)):
            names = tuple(state.name for state in variant.states)
            check_signature(straight(variant.rule), names)
            if variant.measure is not None:
                check_signature(straight(variant.measure), names, sums=True)
        check_precision(self, group)
        check_averaging(self, numbers)
        params = group["params"]
        each = type(self).check_parameter is not RuleOptimizer.check_parameter
        # What no backend must run, some backend can: only a parameter's dtype tells whether it may be optimized.
        some = first_of_each_dtype if self.backend == "auto" else first_of_each_kind
        for i in range(len(params)) if each else some(params):
            p = params[i]
            self.check_parameter(i, p, group)
            if is_lazy(p):
                continue
            choice = choose(request_for(self, group, p), this_machine())
            if choice.backend == "triton" and not this_machine().interpreter:
                compile_ahead.start()
            elif choice.backend == "cpp":
                build_ahead.start(self, group, p)

    def check_parameter(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        """Raise where parameter number `index` of a group is of a kind that the optimizer cannot update."""
        if not (p.is_floating_point() or p.is_complex()):
            raise RuntimeError(
                f"parameter {index} is {p.dtype} on {p.device}; {type(self).__name__} optimizes floating-point and "
                "complex tensors. Leave it out of params."
            )
