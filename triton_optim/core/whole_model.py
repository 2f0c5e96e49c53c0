"""Numbers of the whole model that an optimizer keeps from step to step, on the device."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..buckets.gradient_norm import exact_dtype
from ..spec import Measured, Update
from ..util.in_place import write_each
from .checks import check_positive


class EstimatesDistance(Update):
    """An update that estimates how far the minimum is, and keeps that and what it comes from.

    These are numbers of the whole model. Each parameter's state holds them alike, so that they are saved, resumed and
    moved with it; one that is updated for the first time begins with those of the others. The host never asks for them.

    Class attributes:
        prologue_names: their names, the estimate ``d`` first.
    """

    prologue_names: ClassVar[tuple[str, ...]] = ("d",)

    def first_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """What they are before the first step: ``d0``, and 0."""
        return (float(group["d0"]), *(0.0 for _ in self.prologue_names[1:]))

    @property
    def d(self) -> Tensor:
        """The estimate as it is now: a new 0-dim tensor on the device of the first parameter that has a state."""
        for state in self.state.values():
            if "d" in state:
                return state["d"].detach().clone()
        return torch.tensor(float(self.param_groups[0]["d0"]), dtype=torch.float64, device="cpu")

    def prologue_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        names = self.prologue_names
        for state in self.state.values():
            if all(isinstance(state.get(name), Tensor) for name in names):
                return {name: state[name].detach().to(p.device, copy=True) for name in names}
        wide, first = exact_dtype(p.device), self.first_numbers(group)
        return {
            name: torch.full((), value, dtype=wide, device=p.device) for name, value in zip(names, first, strict=True)
        }

    def kept_numbers(self, measured: Measured) -> tuple[Tensor, ...]:
        """The numbers as they are before the step, in the order of ``prologue_names``."""
        state = measured.states[0]
        # A copy, as they are written before autograd is done with them where the step is differentiable.
        return torch.stack([state[name] for name in self.prologue_names]).unbind()

    def keep_numbers(self, *numbers: Tensor) -> None:
        """Write the numbers as they are after the step, for every parameter that has them."""
        states = [state for state in self.state.values() if "d" in state]
        for name, value in zip(self.prologue_names, numbers, strict=True):
            write_each([state[name] for state in states], [value] * len(states))


def over_model(measured: list[Measured], terms: list[tuple[Tensor, ...]]) -> Tensor:
    """The sums of these numbers, a tuple for each of `measured`, over the model: on the device of the first."""
    device = measured[0].numel.device
    return torch.stack([torch.stack(own).to(device) for own in terms]).sum(0)


def check_estimate(group: dict[str, Any]) -> None:
    """Raise ValueError where what an estimate begins with, or grows by, is out of range."""
    check_positive("d0", group["d0"])
    if not group["growth_rate"] >= 1:
        raise ValueError(f"Invalid growth_rate: {group['growth_rate']}. It must be at least 1.")
