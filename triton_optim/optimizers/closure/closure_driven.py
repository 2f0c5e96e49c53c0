"""What optimizers that call the closure themselves share: the parameters as one flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ...core.checks import check_ranges, hold_numbers
from ...core.wrapping import check_param_group, leave_to_python, ordered
from ...util.layout import ordinary
from .line_search import Trial, strong_wolfe


class ClosureOptimizer(Optimizer):
    """One group of parameters, taken as one flat real vector, and a closure that is called many times a step.

    A complex parameter is its real and imaginary parts in turn, a missing gradient zeros, a sparse one dense. The
    vector of 16-bit parameters is float32, and so is the state: products of theirs would overflow or round away. All
    state is that of the first parameter, as in torch.optim.LBFGS. A group with ``maximize`` is ascended: loss and
    gradient are negated where they are read.

    Args:
        params: parameters or named parameters of one device, or one group of them.
        defaults: hyperparameters, ``lr`` among them.

    Raises:
        ValueError: lr is negative or not 1-element, or there is a second group.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        leave_to_python(cls, "__init__", "step")

    @_disable_dynamo
    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.check_hyperparameters(defaults)
        super().__init__(ordered(params), defaults)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter is out of range: in the constructor, and before every step."""
        hold_numbers(type(self), group)
        check_ranges(group, "lr")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_param_group(param_group)
        super().add_param_group(param_group)  # first, for what torch has against the parameters
        if len(self.param_groups) > 1:
            self.param_groups.pop()
            raise ValueError(
                f"{type(self).__name__} doesn't support per-parameter options (parameter groups): it has one step "
                "length for all parameters. Give them as one group."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of torch's. Vectors come in the dtype of ours: torch casts them to that of the
        first parameter.
        """
        loaded: dict[str, Any] = {}

        def keep(_: Optimizer, state_dict: dict[str, Any]) -> None:
            loaded.update(state_dict)

        def restore(_: Optimizer) -> None:
            numbers = loaded["param_groups"][0]["params"]
            for p, number in zip(self.param_groups[0]["params"][:1], numbers, strict=False):
                if number in loaded["state"]:
                    self.state[p] = copied(loaded["state"][number], self.gather_parameters())

        handles = [
            self.register_load_state_dict_pre_hook(keep),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @property
    def sign(self) -> float:
        """-1 of a group that is maximized. A checkpoint may be older than the option."""
        return -1.0 if self.param_groups[0].get("maximize") else 1.0

    def gather_parameters(self) -> Tensor:
        """All parameters in one vector."""
        return _flat(self.param_groups[0]["params"])

    def gather_gradient(self) -> Tensor:
        """All gradients in one vector; 0 where there is none."""
        flat = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.param_groups[0]["params"]])
        return flat.neg_() if self.sign < 0 else flat

    def scatter_parameters(self, x: Tensor) -> None:
        """Write a vector into the parameters."""
        views = [_real(p) for p in self.param_groups[0]["params"]]
        parts = torch.split(x, [view.numel() for view in views])
        torch._foreach_copy_(views, [part.view_as(view) for part, view in zip(parts, views, strict=True)])

    def start(
        self, closure: Callable[[], Any] | None
    ) -> tuple[Callable[[], tuple[Any, float]], Any, float, Tensor, dict[str, Any]]:
        """Begin a step: the closure as of :meth:`checked`, what it returned, the loss, its gradient, the state."""
        evaluate = self.checked(closure)
        first, loss = evaluate()
        params = self.param_groups[0]["params"]
        if not params:
            return evaluate, first, loss, torch.empty(0, device="cpu"), {}
        # The first parameter's, so that load_state_dict casts them as that parameter.
        state = self.state[params[0]]
        state["func_evals"] = state.get("func_evals", 0) + 1
        state.setdefault("n_iter", 0)
        return evaluate, first, loss, self.gather_gradient(), state

    def checked(self, closure: Callable[[], Any] | None) -> Callable[[], tuple[Any, float]]:
        """Make a closure give what it returns and that as a float to be minimized, with gradients enabled.

        Raises:
            TypeError: there is no closure. RuntimeError (from the result): it returned no loss.
        """
        if not callable(closure):
            raise TypeError(
                f"{type(self).__name__}.step needs a closure, got {closure!r:.80}. Pass a function that clears the "
                "gradients, computes the loss, calls backward and returns the loss."
            )

        def evaluate() -> tuple[Any, float]:
            with torch.enable_grad():
                value = closure()
            if (isinstance(value, Tensor) and value.numel() != 1) or value is None:
                got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "None"
            else:
                try:
                    return value, self.sign * float(value)
                except (TypeError, ValueError, RuntimeError):
                    got = f"a {type(value).__name__}"
            raise RuntimeError(
                f"closure must return the loss as one real number, got {got}. End it with `return loss`."
            )

        return evaluate

    def search(
        self, closure: Callable[[], tuple[Any, float]], start: Trial, direction: Tensor, t: float, **options: Any
    ) -> tuple[Trial, int]:
        """Search along a direction by :func:`strong_wolfe` and move to what it accepts; if it raises, move nowhere."""
        x = self.gather_parameters()
        longest = torch.finfo(x.dtype).max

        def evaluate(t: float) -> tuple[float, Tensor, float]:
            # torch refuses a factor beyond the dtype; the loss at Inf is one of a step too long.
            self.scatter_parameters(x.add(direction, alpha=t if t <= longest else math.inf))
            _, loss = closure()
            g = self.gather_gradient()
            return loss, g, float(g.dot(direction))

        final = x
        try:
            accepted, evaluations = strong_wolfe(evaluate, start, t, **options)
            final = x.add(direction, alpha=accepted.t) if accepted.t else x
        finally:
            self.scatter_parameters(final)
        return accepted, evaluations


def _flat(tensors: list[Tensor]) -> Tensor:
    flat = torch.cat([_real(t.to_dense() if t.is_sparse else t).reshape(-1) for t in tensors])
    return ordinary(flat).to(torch.promote_types(flat.dtype, torch.float32))


def copied(value: Any, like: Tensor | None = None) -> Any:
    """A copy of a state; with `like`, its vectors and floating-point numbers on that device and in that dtype."""
    if isinstance(value, dict):
        return {name: copied(v, like) for name, v in value.items()}
    if isinstance(value, list):
        return [copied(v, like) for v in value]
    if not isinstance(value, Tensor):
        return value
    return value.clone() if like is None or not value.is_floating_point() else value.to(like, copy=True)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def largest(v: Tensor) -> float:
    """Return the largest absolute entry, 0 if there is none."""
    return float(v.abs().max()) if v.numel() else 0.0
