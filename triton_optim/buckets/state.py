"""An optimizer's states as dicts that count their changes, so that a step need not look at every value of every one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

from torch import Tensor

from ..spec import Update
from ..util.layout import local, made_in_inference_mode


class WatchedState(dict[str, Any]):
    """A dict in all that it does. It is saved and copied as a plain one.

    Example:
        >>> from triton_optim.buckets.state import WatchedState
        >>> state, before = WatchedState(step=1), WatchedState.changes
        >>> state["step"] = 2
        >>> WatchedState.changes - before
        1
    """

    changes: ClassVar[int] = 0  # of all states there are, and of which parameters have which

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class WatchedStates(defaultdict[Any, Any]):
    """The state of each parameter, a defaultdict in all that it does, and saved and copied as one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))


def _counted(kind: type, name: str) -> Callable[..., Any]:
    method = getattr(kind, name)

    @wraps(method)
    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        WatchedState.changes += 1
        return method(self, *args, **kwargs)

    return changing


for _kind in (WatchedState, WatchedStates):
    for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
        setattr(_kind, _name, _counted(_kind, _name))


def watch(optimizer: Update) -> None:
    """Make the states of an optimizer, those to come too, such dicts."""
    states = {p: WatchedState(state) if type(state) is dict else state for p, state in optimizer.state.items()}
    optimizer.state = WatchedStates(WatchedState, states)


def contents(state: dict[str, Any]) -> list[tuple[str, Any, int]]:
    """What a state holds, and how often each tensor was written."""
    return [(name, value, _writes(value)) for name, value in state.items()]


def holds(before: list[tuple[str, Any, int]], name: str, value: Any) -> bool:
    """Whether a value is the one that a state held by this name, and was not written since."""
    return any(n == name and v is value and w == _writes(v) for n, v, w in before)


def are_contents(state: dict[str, Any], before: list[tuple[str, Any, int]]) -> bool:
    """Whether a state holds what it held, and nothing was written since."""
    same = ((n, w) == (name, _writes(v)) and v is value for (n, value, w), (name, v) in zip(before, state.items()))  # noqa: B905
    return len(state) == len(before) and all(same)


def _writes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    own = local(value)  # which is written past a DTensor
    return 0 if made_in_inference_mode(own) else own._version
