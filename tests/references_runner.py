"""What runs a reference over parameters and steps. references.py says how it is called."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
States = list[dict[str, Any]]


def reference(update: Callable[..., np.ndarray]) -> Callable[..., tuple[Arrays, States]]:
    """Runs the update of one parameter at one step over all parameters and steps."""

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
                for i, (g, state) in enumerate(zip(step_grads, states, strict=True)):
                    if g is None:
                        continue
                    g = np.array(g, dtype, subok=True)  # A mask stays.
                    p = update(params[i], -g if maximize else g, state, **h)
                    params[i] = np.asarray(p)  # NumPy's arithmetic on 0-dim arrays gives scalars.
                    state.update({name: np.asarray(s) for name, s in state.items()})
        return params, states

    return functools.wraps(update)(run)
