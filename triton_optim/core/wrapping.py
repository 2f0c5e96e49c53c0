"""What torch and Dynamo lay around a class of optimizers: hooks, and constructors that no compiled function traces."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import isroutine
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# Each module on the way to a function takes as long as the question.
is_compiling, profiled = torch.compiler.is_compiling, torch._C._autograd._profiler_enabled


def with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``step`` as torch wraps it: hooks before and after it, and a range for the profiler. Without any of them
    torch's wrapper would take longer than the step of a small model, so that it is left out.
    """
    hooked = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if type(self).step is not wrapper:  # a subclass's own, which torch has wrapped, and which called this one
            return step(self, *args, **kwargs)
        if (
            is_compiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiled()
        ):
            return hooked(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch wraps it no more
    return wrapper


def ordered(params: Any) -> Any:
    """The parameters as they are; a set as a list, with the warning that torch has for it from 2.15 on. It points at
    the line that made the optimizer: what Dynamo and the classes lay around their constructors differs.
    """
    check_iterable(params)
    if not isinstance(params, (set, frozenset)):
        return params
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("triton_optim", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"optimizer parameters need to be organized in ordered collections, got a {type(params).__name__}: its order, "
        "and with it a state dict's, changes from run to run. Give a list.",
        FutureWarning,
        stacklevel=level,
    )
    return list(params)


def check_iterable(params: Any) -> None:
    """Raise TypeError where what stands for parameters can't be iterated over."""
    if not (hasattr(params, "__iter__") or hasattr(params, "__getitem__")):
        fix = "Call it." if isroutine(params) else "Give a list of tensors or of groups, such as model.parameters()."
        raise TypeError(f"params is {params!r:.80}, of type {type(params).__name__}, which is not iterable. {fix}")


def check_param_group(group: Any) -> None:
    """Raise KeyError where a group has no parameters, TypeError where these can't be iterated over."""
    if not isinstance(group, dict):
        return  # torch refuses it
    if "params" not in group:
        raise KeyError(f"a parameter group needs the key 'params', and this has {list(group)}. Give its tensors so.")
    check_iterable(group["params"])


def leave_to_python(cls: type[Optimizer], *methods: str) -> None:
    """Let no compiled function trace these methods of a class. Of a constructor Dynamo leaves torch's part to Python,
    and what was set before it would then be set on no object.
    """
    for name in methods:
        if name in cls.__dict__:
            setattr(cls, name, _disable_dynamo(cls.__dict__[name]))
