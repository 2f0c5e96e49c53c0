"""A first step that is made only so that states exist. It must not count.

torch.distributed.checkpoint makes one of a fresh optimizer, with a learning rate of 0 and gradients of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..buckets.state import are_contents, contents, holds
from ..spec import Update
from ..util.layout import local


class Probe:
    """The states that such a step made. They are made anew where weights are loaded or options change.

    It is false where there was none.
    """

    def __init__(self) -> None:
        self._made: dict[Tensor, list[Any]] = {}  # the parameters, and what their states held

    def __bool__(self) -> bool:
        return bool(self._made)

    @staticmethod
    def is_made_by(optimizer: Update, gradients: list[Tensor | None]) -> bool:
        """Whether a first step with these gradients is a probe."""
        rates = [group.get("lr") for group in optimizer.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return False  # the host does not wait for it
        return all(rate is not None and rate == 0 for rate in rates) and not any(
            (g._values() if g.is_sparse else g).any() for g in gradients if g is not None
        )

    def note(self, optimizer: Update) -> None:
        """Note that the present states were made for a probe."""
        self._made = {p: contents(state) for p, state in optimizer.state.items()}

    def params(self, optimizer: Update) -> list[Tensor]:
        """The parameters whose states are as the probe made them."""
        states = optimizer.state
        return [p for p, made in self._made.items() if p in states and are_contents(states[p], made)]

    def left(self, p: Tensor, name: str, value: Any) -> bool:
        """Whether a value of a state dict is what the probe made of the weights that there were, and nothing was loaded
        into it.
        """
        return holds(self._made.get(p, []), name, value)

    def gradients(self, optimizer: Update, params: list[Tensor]) -> list[Tensor | None]:
        """Those with which such a step would make the same states."""
        own = set(map(id, self.params(optimizer)))
        return [torch.zeros_like(local(p)) if id(p) in own else None for p in params]

    def undo(self, optimizer: Update) -> None:
        """Drop the states that are as the probe made them."""
        for p in self.params(optimizer):
            del optimizer.state[p]
        self._made = {}
