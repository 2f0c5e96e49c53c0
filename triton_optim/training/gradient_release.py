"""Gradient release: each parameter is updated as its gradient arrives in backward, and the gradient is freed."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..core.checks import check_alone
from ..core.optimizer import RuleOptimizer
from ..core.unwrap import unwrap_optimizer
from ..engine.processes import check_reduced_before
from ..spec import COUNT
from ..util.layout import local, overlapping

_released: Any = WeakIdKeyDictionary()  # parameters whose gradients are released


class GradientRelease:
    """What :func:`enable_gradient_release` returns."""

    def __init__(self, optimizer: RuleOptimizer, accumulating: Callable[[], bool] | None = None) -> None:
        name = type(optimizer).__name__
        if optimizer.engine.release is not None:
            raise RuntimeError(f"{name}: gradient release is enabled already. Keep its handle, or remove() it first.")
        check_alone(name, optimizer.max_grad_norm, optimizer.amp)
        if optimizer.needs_all:
            raise RuntimeError(
                f"{name}: its update of a parameter needs the gradients of all, which gradient release never has at "
                "once. Leave gradient release out, or use an optimizer whose parameters are updated on their own."
            )
        self._optimizer = optimizer
        self._accumulating, self._asked = False, accumulating
        self._arrived: dict[int, Tensor] = {}  # parameters that were updated since the last step, by identity
        self._averaged: float | None = None
        self._alone = False  # whether no one else was found to be at the gradients
        self._indices: dict[int, int] = {}
        self._hooks: dict[int, tuple[Tensor, Any]] = {}  # of each parameter, with it
        optimizer.engine.take_params()
        self.follow(optimizer.engine.params, optimizer.engine.repeats)
        optimizer.engine.release = self

    def follow(self, params: list[Tensor], repeats: bool) -> None:
        """Release the gradients of these, which the optimizer has now, and of no others.

        Args:
            params: all of its parameters.
            repeats: whether one is there twice.
        """
        check_params(type(self._optimizer).__name__, params, repeats, self._hooks)
        self._indices = {id(p): i for i, p in enumerate(params)}
        for key in self._hooks.keys() - self._indices.keys():
            self._unhook(key)
        self._hook(params)

    def _hook(self, params: list[Any]) -> None:
        for p in params:
            if p.requires_grad and id(p) not in self._hooks and not is_lazy(p):
                self._hooks[id(p)] = p, p.register_post_accumulate_grad_hook(self._arrive)
                _released[p] = True

    def _unhook(self, key: int) -> None:
        p, hook = self._hooks.pop(key)
        hook.remove()
        _released.pop(p, None)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within it gradients are kept and add up, as without release; those of the backward that follows it are
        released together with them.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Let the optimizer step as ever."""
        for key in list(self._hooks):
            self._unhook(key)
        if self._optimizer.engine.release is self:
            self._optimizer.engine.release = None

    def restart(self) -> None:
        """Start a round with the states as they are."""
        self._arrived.clear()
        self._averaged = None

    @property
    def averaged(self) -> float:
        """Of how many values the averages were at the start of the round."""
        if self._averaged is None:
            counts = ((p, state[COUNT]) for p, state in self._optimizer.state.items() if COUNT in state)
            self._averaged = max((float(n) - (id(p) in self._arrived) for p, n in counts), default=0.0)
        return self._averaged

    def step(self, gradients: list[Tensor | None] | None = None) -> None:
        """End a round: update what did not arrive but has a gradient, and average what has none. What arrives from here
        on belongs to the next.

        Args:
            gradients: one for each parameter; left out, those that they have.
        """
        optimizer = self._optimizer
        self._check()
        params = optimizer.engine.params
        gradients = [p.grad for p in params] if gradients is None else gradients
        if self._arrived:
            for index, (p, g) in enumerate(zip(params, gradients, strict=True)):
                stays = id(p) not in self._arrived and COUNT in optimizer.state.get(p, ())
                if g is not None or stays:
                    optimizer.engine.update_one(index, g)
                    self._arrived[id(p)] = p
            optimizer._opt_called = True
        else:
            optimizer.engine.update(gradients)
        self.restart()
        self._hook(params)  # those that were frozen

    def _check(self) -> None:
        """Look at what a user may have changed."""
        optimizer = self._optimizer
        check_alone(type(optimizer).__name__, optimizer.max_grad_norm, optimizer.amp)
        optimizer.engine.take_params()

    def _arrive(self, p: Tensor) -> None:
        if self._accumulating or (self._asked is not None and self._asked()):
            return
        if not self._arrived:  # once a round
            self._check()
            if not self._alone:  # not before: a model may be wrapped after its optimizer is made
                check_reduced_before(type(self._optimizer).__name__, self._optimizer.engine.params)
                self._alone = True
        index = self._indices.get(id(p))
        if index is None:
            return  # it was taken out of the optimizer
        if id(p) in self._arrived:
            raise RuntimeError(
                f"the gradient of parameter {index} arrived twice since the last step: it was updated with the first. "
                "Call optimizer.step() after every backward, or run those that add up within handle.accumulating()."
            )
        self._optimizer.engine.update_one(index, p.grad)
        self._arrived[id(p)] = p
        p.grad = None


def enable_gradient_release(optimizer: Optimizer, accumulating: Callable[[], bool] | None = None) -> GradientRelease:
    """Update each parameter as soon as its gradient is complete in ``backward``, and free the gradient.

    No more than a few gradients are alive at a time, so that training takes the memory of the gradients less. What the
    steps compute is the same. ``optimizer.step()`` then only ends the round, for schedulers as ever, and
    ``zero_grad()`` finds nothing to clear. Parameter groups and states may be edited between two rounds.

    Args:
        optimizer: one of this package's, or what a trainer made of it, without `max_grad_norm` and `amp`: both need all
            gradients at once.
        accumulating: asked as a gradient arrives: whether it is to be kept, for a trainer that knows which backward is
            the last of a step.

    Returns:
        A handle: ``with handle.accumulating():`` around all but the last backward of a step that accumulates gradients;
        ``handle.remove()`` ends it.

    Raises:
        RuntimeError: the optimizer limits the norm or unscales gradients, its parameters share memory or are listed
            twice, or their gradients are released already; or one of these comes about later. Later: a gradient
            arrives twice in a round.

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = triton_optim.SGD(model.parameters(), lr=0.1, backend="eager")
        >>> handle = triton_optim.enable_gradient_release(optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
    """
    return GradientRelease(unwrap_optimizer(optimizer), accumulating)


def check_params(name: str, params: list[Tensor], repeats: bool, own: Container[int]) -> None:
    """Raise RuntimeError where the gradients of these parameters can't be released one by one.

    Args:
        name: of the optimizer.
        params: all that it has.
        repeats: whether one is there twice.
        own: the identities of those whose gradients it releases already.
    """
    if repeats or overlapping([local(p) for p in params]):
        raise RuntimeError(
            f"{name}: parameters that share memory, or are listed twice, have no gradient of their own to release. "
            "Give each once, or remove() the handle of gradient release."
        )
    check_not_released(params, own)


def check_not_released(params: Iterable[Tensor], own: Container[int] = ()) -> None:
    """Raise RuntimeError where a gradient of `params` is released in backward, but for those of `own` identities."""
    for i, p in enumerate(params):
        if p in _released and id(p) not in own:
            raise RuntimeError(
                f"the gradient of parameter {i} is released in backward, before all are there: it can be neither "
                "clipped nor scaled with the others, nor released again. remove() the handle of gradient release."
            )
