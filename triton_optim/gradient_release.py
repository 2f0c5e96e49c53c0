"""Gradient release: each parameter is updated as its gradient arrives in backward, and the gradient is freed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .averaging import largest_count
from .codecs import COUNT
from .layout import local, overlapping

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer

_released: Any = WeakIdKeyDictionary()  # parameters whose gradients are released


class GradientRelease:
    """What :func:`enable_gradient_release` returns."""

    def __init__(self, optimizer: RuleOptimizer) -> None:
        check(optimizer)
        self._optimizer = optimizer
        self._accumulating = False
        self._arrived: set[int] = set()  # since the last step
        self.averaged = 0.0  # of how many values the averages were then
        self._places: dict[int, int] = {}
        self._hooks: list[Any] = []
        self._params: list[Tensor] = []
        self.follow(optimizer._flat)
        optimizer._release = self
        self.restart()

    def follow(self, params: list[Any]) -> None:
        """Release the gradients of these, too, which the optimizer has taken on."""
        self._places = {id(p): i for i, p in enumerate(self._optimizer._flat)}
        own = [p for p in params if p.requires_grad]
        self._hooks += [p.register_post_accumulate_grad_hook(self._arrive) for p in own]
        for p in own:
            _released[p] = True
        self._params += own

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
        for hook in self._hooks:
            hook.remove()
        for p in self._params:
            _released.pop(p, None)
        if self._optimizer._release is self:
            self._optimizer._release = None

    def restart(self) -> None:
        """Start a round with the states as they are."""
        self._arrived.clear()
        self.averaged = largest_count(self._optimizer)

    def step(self, gradients: list[Tensor | None]) -> None:
        """End a round: update what did not arrive but has a gradient, and average what has none. What arrives from here
        on belongs to the next.
        """
        optimizer = self._optimizer
        if self._arrived:
            for place, (p, g) in enumerate(zip(optimizer._flat, gradients, strict=True)):
                stays = place not in self._arrived and COUNT in optimizer.state.get(p, ())
                if g is not None or stays:
                    optimizer.update_one(place)
            optimizer._opt_called = True
        else:
            optimizer.update(gradients)
        self._arrived.clear()
        self.averaged += any(COUNT in state for state in optimizer.state.values())

    def _arrive(self, p: Tensor) -> None:
        if self._accumulating:
            return
        place = self._places[id(p)]
        if place in self._arrived:
            raise RuntimeError(
                f"the gradient of parameter {place} arrived twice since the last step: it was updated with the first. "
                "Call optimizer.step() after every backward, or run those that add up within handle.accumulating()."
            )
        self._optimizer.update_one(place)
        self._arrived.add(place)
        p.grad = None


def enable_gradient_release(optimizer: RuleOptimizer) -> GradientRelease:
    """Update each parameter as soon as its gradient is complete in ``backward``, and free the gradient.

    No more than a few gradients are alive at a time, so that training takes the memory of the gradients less. What the
    steps compute is the same. ``optimizer.step()`` then only ends the round, for schedulers as ever, and
    ``zero_grad()`` finds nothing to clear.

    Args:
        optimizer: one of this package's, without `max_grad_norm` and `amp`: both need all gradients at once.

    Returns:
        A handle: ``with handle.accumulating():`` around all but the last backward of a step that accumulates gradients;
        ``handle.remove()`` ends it.

    Raises:
        RuntimeError: the optimizer limits the norm or unscales gradients, its parameters share memory or are listed
            twice, or their gradients are released already. Later: a gradient arrives twice in a round.

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
    return GradientRelease(optimizer)


def check(optimizer: RuleOptimizer) -> None:
    """Raise RuntimeError where gradients can't be released one by one."""
    name = type(optimizer).__name__
    if optimizer._release is not None:
        raise RuntimeError(f"{name}: gradient release is enabled already. Keep its handle, or remove() it first.")
    if optimizer.max_grad_norm is not None:
        raise RuntimeError(
            f"{name}: max_grad_norm={optimizer.max_grad_norm} limits the norm of all gradients, which gradient release "
            "never has at once. Leave one of them out."
        )
    if optimizer.amp is not None:
        raise RuntimeError(
            f'{name}: amp="{optimizer.amp}" skips a step whose gradients are not all finite, which gradient release '
            "never has at once. Leave one of them out; bfloat16 needs no scaler."
        )
    if optimizer._repeats or overlapping([local(p) for p in optimizer._flat]):
        raise RuntimeError(
            f"{name}: parameters that share memory, or are listed twice, have no gradient of their own to release. "
            "Give each once."
        )
    check_not_released(optimizer._flat)


def check_not_released(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where the gradients of `params` are released in backward."""
    for i, p in enumerate(params):
        if p in _released:
            raise RuntimeError(
                f"the gradient of parameter {i} is released in backward, before all are there: it can be neither "
                "clipped nor scaled with the others, nor released again. remove() the handle of gradient release."
            )
