"""What each optimizer should compute: written from the papers, in plain NumPy and float64.

Nothing here is shared with the package or with torch, so that a mistake of theirs can't be repeated here.
Speed does not matter. Every reference is called alike:

    params, states = adam(params, grads, lr=1e-2, betas=(0.9, 0.99), maximize=True)

    params   list of arrays, any shapes; never written to
    grads    one list for each step, as long as params; None leaves that parameter, and its step count, alone
    further  torch's argument names and defaults for one parameter group; each a value, or a callable that
             takes the index of the step (from 0, counting every step) and returns one
    dtype    the arithmetic. np.longdouble, where it is wider, can judge float64 itself: there the rounding of
             a float64 reference is as large as the error that it is to measure.

It returns the new parameters, and for each parameter a dict with torch's state names. As in torch, the dict
is empty before the first gradient, and "step" is in it only if torch keeps one.

To add an optimizer, write the update of one parameter at one step, and put it in the table at the end. It
gets the parameter p, the gradient g (negated already if maximize) and the parameter's state, and returns the
new p. It binds new arrays and never writes into old ones.
"""

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
                    g = np.array(g, dtype)
                    p = update(params[i], -g if maximize else g, state, **h)
                    params[i] = np.asarray(p)  # NumPy's arithmetic on 0-dim arrays gives scalars.
                    state.update({name: np.asarray(s) for name, s in state.items()})
        return params, states

    return functools.wraps(update)(run)


@reference
def adam(
    p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
    decoupled_weight_decay=False,
):  # fmt: skip
    """Kingma & Ba 2015, Algorithm 1, with both weight decays of Loshchilov & Hutter 2019, Algorithm 2.

    As torch documents it: the decoupled decay is multiplied by lr (the paper: by the schedule's factor only),
    and AMSGrad takes the maximum over the second moments before their bias correction (Reddi et al. 2018,
    Algorithm 2, has no bias correction).
    """
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    if not decoupled_weight_decay:
        g, decay = g + decay, 0
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", 0), v)
    m_hat = m / (1 - b1**t)
    v_hat = v / (1 - b2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay)


# Loshchilov & Hutter 2019, Algorithm 2: their two algorithms differ in the place of the decay alone.
adamw = functools.partial(adam, weight_decay=1e-2, decoupled_weight_decay=True)


@reference
def sgd(p, g, state, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    """Sutskever et al. 2013, section 2, in the form that torch documents.

    There lr multiplies the velocity, not the gradient in it, and the velocity starts as the first gradient,
    undamped, instead of 0. Steps with momentum 0 neither start the velocity nor change it.
    """
    if weight_decay != 0:
        g = g + weight_decay * p
    if momentum != 0:
        b = state.get("momentum_buffer")
        b = state["momentum_buffer"] = g if b is None else momentum * b + (1 - dampening) * g
        g = g + momentum * b if nesterov else b
    return p - lr * g


@reference
def lion(p, g, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0):
    """Chen et al. 2023, Algorithm 2. sign(0) is 0, and sign(NaN) is NaN (torch.sign says 0)."""
    b1, b2 = betas
    m = state.get("exp_avg", 0)
    c = b1 * m + (1 - b1) * g
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    p = p - lr * (np.sign(c) + decay)
    state["exp_avg"] = b2 * m + (1 - b2) * g
    return p


# By the name of the class, so that a test of many optimizers finds the reference of each.
REFERENCES: dict[str, Callable[..., tuple[Arrays, States]]] = {
    "Adam": adam,
    "AdamW": adamw,
    "Lion": lion,
    "SGD": sgd,
}
