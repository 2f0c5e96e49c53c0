"""What runs a reference over parameters and steps. references.py says how it is called."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
States = list[dict[str, Any]]


def step(updates: list[Any]) -> Arrays:
    """What the updates of all parameters in one step come to.

    An update that needs sums over the whole model is a generator. It yields what is summed, is sent the sum, and then
    returns as others do.
    """
    if not any(map(inspect.isgenerator, updates)):
        return updates
    total, new = sum(map(np.asarray, map(next, updates))), []
    for update in updates:
        try:
            update.send(total)
        except StopIteration as end:
            new.append(end.value)
    return new


def begin(states: States, new: States, names: tuple[str, ...]) -> None:
    """Give the states that are empty the numbers of the whole model, where there are any."""
    held = next((state for state in states if state), None)
    for state in new:
        if held is not None and not state:
            state.update({name: held[name] for name in names})


def spread(states: States, new: States, names: tuple[str, ...]) -> None:
    """Give every state the numbers of the whole model, as those that a step has changed have them. One that is empty
    stays so.
    """
    for state in states:
        if state:
            state.update({name: new[0][name] for name in names if new})


def reference(update: Callable[..., Any] | None = None, *, of_model: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Runs the update of one parameter at one step over all parameters and steps.

    Args:
        update: of a parameter; see :func:`step`.
        of_model: names of the states that are numbers of the whole model.
    """
    if update is None:
        return functools.partial(reference, of_model=of_model)

    def at(value: Any, index: int, dtype: type) -> Any:
        value = value(index) if callable(value) else value
        if isinstance(value, (tuple, list)):
            return tuple(at(v, index, dtype) for v in value)
        # Else `1 - beta` would be rounded to float64 before it meets a longdouble.
        return dtype(value) if isinstance(value, float) else value

    defaults = {
        name: argument.default
        for name, argument in inspect.signature(update).parameters.items()
        if argument.default is not argument.empty
    }

    def run(
        params: Arrays,
        grads: list[list[np.ndarray | None]],
        *,
        maximize: bool = False,
        dtype: type = np.float64,
        **hyperparameters: Any,
    ) -> tuple[Arrays, States]:
        params = [np.array(p, dtype) for p in params]
        states: States = [{} for _ in params]
        with np.errstate(all="ignore"):  # Inf and NaN pass through silently.
            for index, step_grads in enumerate(grads):
                h = {name: at(value, index, dtype) for name, value in (defaults | hyperparameters).items()}
                there = [i for i, g in enumerate(step_grads) if g is not None]
                begin(states, [states[i] for i in there], of_model)
                updates = []
                for i in there:
                    g = np.array(step_grads[i], dtype, subok=True)  # A mask stays.
                    updates.append(update(params[i], -g if maximize else g, states[i], **h))
                for i, p in zip(there, step(updates), strict=True):
                    params[i] = np.asarray(p)  # NumPy's arithmetic on 0-dim arrays gives scalars.
                    states[i].update({name: np.asarray(s) for name, s in states[i].items()})
                spread(states, [states[i] for i in there], of_model)
        return params, states

    wrapped = functools.wraps(update)(run)
    wrapped.of_model = of_model  # type: ignore[attr-defined]
    return wrapped
