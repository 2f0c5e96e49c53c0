"""The options of every optimizer: types, defaults, one line each for docstrings, and what is said of an unknown one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypedDict, get_type_hints

import torch

from .dispatch import Backend
from .util.once import warn_once


class OwnOptions(TypedDict, total=False):
    """The options that torch's constructors don't take by position: those of this package, and `fused`."""

    fused: bool | None
    state_dtype: torch.dtype | Literal["float32", "bfloat16", "int8", "int4"] | None
    param_precision: Literal["storage", "stochastic", "kahan", "split24", "split32", "master"]
    seed: int
    amp: Literal["fused"] | None
    max_grad_norm: float | None
    ema_decay: float | None
    ema_dtype: torch.dtype | Literal["float32", "bfloat16"] | None
    ema_warmup: bool
    offload: Literal["cpu"] | None
    backend: Literal["auto", Backend]


class OptionsAfterForeach(OwnOptions, total=False):
    """The options of a constructor that takes `foreach` by position, as torch's."""

    maximize: bool
    capturable: bool
    differentiable: bool


class Options(OptionsAfterForeach, total=False):
    """The options of every optimizer, as keywords: ``def __init__(self, params, lr=1e-3, **options: Unpack[Options])``.

    foreach: True prefers the compiled backend; False, with fused not True, is eager.
    maximize: ascend instead of descend.
    capturable: keep the step count on the device and form the scalars there, so that a step can be captured.
    differentiable: let autograd record the step (eager).
    fused: True prefers the one-kernel backend of the device; False, with foreach not True, is eager.
        It is Triton on a GPU, C++ on a CPU.
    state_dtype: keep the states in float32, bfloat16, "int8" or "int4"; None for the parameter's dtype.
        ``torch.bfloat16`` has stochastic rounding. ``"int8"`` and ``"int4"`` are codes that share a scale, 256 and 64
        of them (kernels/codecs.py), for parameters of 4,096 elements or more that are contiguous; the states of others
        are float32. Of a sharded parameter each shard has codes of its own. A dtype may be given by its name,
        ``"bfloat16"``. A group option, too: ``{"params": ..., "state_dtype": None}`` exempts a group.
    param_precision: how 16-bit parameters are rounded, and whether what rounding leaves is kept.
        ``"storage"`` rounds to the nearest, and loses updates of less than half a step; ``"stochastic"`` rounds up or
        down so that the mean is exact; the others keep what rounding leaves, beside the parameter: ``"kahan"`` in its
        dtype, ``"split24"`` in 8 more bits, with stochastic rounding, ``"split32"`` in 16, with which a bfloat16
        parameter is an exact float32, and ``"master"`` a float32 copy. Wider parameters stay as they are: the group of
        a model that becomes bfloat16 later, or that is so in part, may have it.
    seed: an int that the random bits of stochastic rounding depend on.
        They depend on the number of the update, too, on the index of the parameter among the optimizer's and on that of
        the element, and on nothing else; of shards that are not of whole rows, on which shard it is.
    amp: "fused" unscales the gradients of a GradScaler and skips infinite ones, inside the update.
        The host waits for nothing where Triton runs the rule, and nothing else before it. `max_grad_norm` is then of
        the gradients without their factor, and ``unscale_`` is not needed. None leaves both to the scaler.
    max_grad_norm: limit the norm of all gradients together, as clip_grad_norm_ does, without writing them.
        They are read once, and the update multiplies by what comes of it. ``grad_norm`` is the norm of the last step, a
        0-dim tensor on the device.
    ema_decay: keep an exponential moving average of the weights with this decay, such as 0.999.
        In the same pass, as ``torch.optim.swa_utils.AveragedModel`` that is updated after every step. None keeps none.
    ema_dtype: keep the average in float32 or bfloat16; None for float32, or the parameter's dtype where that is wider.
        ``torch.bfloat16`` has stochastic rounding.
    ema_warmup: let the decay of the average rise to ema_decay: (1 + n) / (10 + n) after n steps.
    offload: "cpu" keeps what the optimizer keeps in host memory, and steps it there: states, master copies, averages.
        Gradients are copied to the host and parameters back, in pieces, beside the arithmetic, by the C++ loop. A
        parameter goes over with its gradient, unless ``param_precision="master"`` keeps a copy of it. It excludes
        `capturable`, `differentiable`, sparse gradients and ``backend="triton"``. A group option, too. Of
        parameters on a CPU it saves nothing; the step is the same. :meth:`RuleOptimizer.offload_states` moves
        states for a while.
    backend: "auto", or the one that must run: "triton", "cpp", "compiled" or "eager".
    """

    foreach: bool | None


OPTIONS: dict[str, Any] = {
    "foreach": None,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "state_dtype": None,
    "param_precision": "storage",
    "seed": 0,
    "amp": None,
    "max_grad_norm": None,
    "ema_decay": None,
    "ema_dtype": None,
    "ema_warmup": False,
    "offload": None,
    "backend": "auto",
}
DTYPE_OPTIONS = ("state_dtype", "ema_dtype")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OF_ALL = ("amp", "max_grad_norm", "backend")  # no group has one of its own
# With ``python -OO`` there are none.
LINES = re.findall(r"^\w+: .*$", inspect.cleandoc(Options.__doc__ or ""), re.MULTILINE)
SECTION = "\n    ".join(["Options, of which :class:`triton_optim.Options` says more:", *LINES])


class OptimizerSignature:
    """The signature of a class: its constructor's, with every option in place of ``**options``."""

    def __get__(self, _: object, cls: type) -> inspect.Signature:
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
        if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
            types, taken = get_type_hints(Options), {parameter.name for parameter in own}
            own[-1:] = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
                for name, default in OPTIONS.items()
                if name not in taken
            ]
        return inspect.Signature(own)


def describe_options(cls: type) -> None:
    """Add a line an option to the docstring of an optimizer whose constructor takes all of them."""
    code = getattr(inspect.unwrap(cls.__init__), "__code__", None)  # type: ignore[misc]
    if LINES and code is not None and code.co_flags & inspect.CO_VARKEYWORDS:
        text = inspect.getdoc(cls) or ""
        cls.__doc__ = text if SECTION in text else f"{text}\n\n{SECTION}"


# What other packages, and papers, call a hyperparameter.
SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "epsilon": "eps",
    "beta1": "betas",
    "beta2": "betas",
    "b1": "betas",
    "b2": "betas",
    "mu": "momentum",
    "grad_clip": "max_grad_norm",
    "clip_norm": "max_grad_norm",
}


@cache
def nearest(name: str, known: tuple[str, ...], sure: bool = False) -> str | None:
    """The name of those that are known which an unknown one may be meant for.

    Args:
        sure: leave out what the unknown name may be by chance.
    """
    lower = name.lower()
    usual = SYNONYMS.get(lower)
    near = [usual] if lower not in known and usual in known else get_close_matches(lower, known, 1, 0.85)
    if not near and not sure:  # a wrapper's has another word before it: lookahead_alpha
        near = [own for own in known if own.endswith(f"_{lower}")] or get_close_matches(lower, known, 1)
    return next(iter(near), None)


def check_known(cls: type, options: Mapping[str, Any]) -> None:
    """Raise TypeError where an option is unknown."""
    for name, value in options.items():
        if name not in OPTIONS:
            known = (*dict.fromkeys([*inspect.signature(cls).parameters, *OPTIONS]),)
            near = nearest(name, known)
            fix = f"Did you mean {near}?" if near else f"It takes {', '.join(known)}."
            raise TypeError(f"{cls.__name__} got an unexpected keyword argument: {name}={value!r}. {fix}")


def check_group_keys(optimizer: Any, group: Mapping[str, Any]) -> None:
    """Look at what a parameter group holds beside hyperparameters. Keys of the user's own are theirs; one that is much
    like a hyperparameter is warned of.

    Raises:
        ValueError: one is an option of the whole optimizer, which has another value there.
    """
    title = type(optimizer).__name__
    known = (*dict.fromkeys(["params", "param_names", *optimizer.defaults, *optimizer.group_names, *OPTIONS]),)
    for name, value in group.items():
        if name in OF_ALL and value != getattr(optimizer, name):
            raise ValueError(
                f"a parameter group of {title} has {name}={value!r}, which is of the whole optimizer. Give it to the "
                f"constructor: {title}(groups, {name}={value!r})."
            )
        if name not in known and isinstance(name, str) and (near := nearest(name, known, sure=True)):
            warn_once(
                f"a parameter group of {title} has {name}={value!r}, which nothing reads. If {near} was meant, "
                "rename it."
            )


def hold_dtypes(options: dict[str, Any]) -> None:
    """Put dtypes in the place of their names, which files of settings have."""
    for name in DTYPE_OPTIONS:
        if isinstance(value := options.get(name), str):
            options[name] = DTYPES.get(value.removeprefix("torch."), value)


def saved_dtype(value: Any) -> Any:
    """A hyperparameter as it is saved: torch's tools for distributed checkpoints know no dtypes."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@cache
def switches(cls: type) -> frozenset[str]:
    """The arguments of a class that are True or False."""
    own = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]  # without the options: that is quick
    defaults = {**OPTIONS, **{argument.name: argument.default for argument in own}}
    return frozenset({"foreach", "fused", *(name for name, value in defaults.items() if isinstance(value, bool))})


def check_options(cls: type, options: Mapping[str, Any]) -> None:
    """Look at the options of a group.

    Raises:
        TypeError: text stands for True or False, or the seed is no int.
        ValueError: one is none that there is.
        RuntimeError: some exclude each other.
    """
    for name in switches(cls):
        if isinstance(value := options.get(name), str):
            raise TypeError(f"Invalid {name}: {value!r}, which is text. Give True or False, without quotation marks.")
    if not hasattr(seed := options.get("seed", 0), "__index__"):
        raise TypeError(f"Invalid seed: {seed!r}, of type {type(seed).__name__}. It must be an int.")
    if options.get("fused") and options.get("differentiable"):
        raise RuntimeError("`fused` does not support `differentiable`: leave one of them out.")
    if options.get("fused") and options.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together: leave one of them out.")
    offload = options.get("offload")
    if offload not in (None, "cpu"):
        raise ValueError(f'Invalid offload: {offload!r}. Use "cpu", or None to keep the states beside the parameters.')
    for name in ("capturable", "differentiable"):
        if offload and options.get(name):
            raise RuntimeError(f"a step on the host can't be {name}: leave offload or {name} out.")
