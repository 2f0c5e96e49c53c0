"""A parameter's state as a dict that counts its changes, so that a step need not look at every value of every one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer


class State(dict[str, Any]):
    """A dict in all that it does. It is saved and copied as a plain one.

    Example:
        >>> from triton_optim.state import State
        >>> state, before = State(step=1), State.changes
        >>> state["step"] = 2
        >>> State.changes - before
        1
    """

    changes: ClassVar[int] = 0  # of all states there are

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _counted(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def changing(self: State, *args: Any, **kwargs: Any) -> Any:
        State.changes += 1
        return method(self, *args, **kwargs)

    return changing


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(State, _name, _counted(_name))


def watch(optimizer: RuleOptimizer) -> None:
    """Make the states of an optimizer, those to come too, such dicts."""
    states = {p: State(state) if type(state) is dict else state for p, state in optimizer.state.items()}
    optimizer.state = defaultdict(State, states)
