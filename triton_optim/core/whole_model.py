"""Numbers of the whole model that an optimizer keeps from step to step, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..buckets.gradient_norm import exact_dtype
from ..spec import Measured, State, Update
from ..util.in_place import write_each
from .checks import check_positive


class EstimatesDistance(Update):
    """An update that estimates how far the minimum is, and keeps that and what it comes from.

    Those whose start is no function are numbers of the whole model. Each parameter's state holds them alike, so that
    they are saved, resumed and moved with it; one that is updated for the first time begins with those of the others.
    The host never asks for them.

    Class attributes:
        kept_states: these, the estimate ``d`` first.
    """

    kept_states: ClassVar[tuple[State, ...]] = (State("d"),)

    def first_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """What they are before the first step: ``d0``, and 0."""
        return (float(group["d0"]), *(0.0 for _ in self.numbers_of_model[1:]))

    @property
    def numbers_of_model(self) -> list[str]:
        """The names of these numbers among the kept states."""
        return [state.name for state in self.kept_states if not callable(state.start)]

    @property
    def d(self) -> Tensor:
        """The estimate as it is now: a new 0-dim tensor on the device of the first parameter that has a state."""
        for state in self.state.values():
            if "d" in state:
                found: Tensor = state["d"]
                return found.detach().clone()
        return torch.tensor(float(self.param_groups[0]["d0"]), dtype=torch.float64, device="cpu")

    def first_kept(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        names = self.numbers_of_model
        for state in self.state.values():
            if all(isinstance(state.get(name), Tensor) for name in names):
                return {name: state[name].detach().to(p.device, copy=True) for name in names}
        wide, first = exact_dtype(p.device), self.first_numbers(group)
        return {
            name: torch.full((), value, dtype=wide, device=p.device) for name, value in zip(names, first, strict=True)
        }

    def kept_numbers(self, measured: Measured) -> tuple[Tensor, ...]:
        """The numbers as they are before the step, in the order of ``kept_states``."""
        state = measured.states[0]
        # A copy, as they are written before autograd is done with them where the step is differentiable.
        return torch.stack([state[name] for name in self.numbers_of_model]).unbind()

    def keep_numbers(self, *numbers: Tensor) -> None:
        """Write the numbers as they are after the step, for every parameter that has them."""
        states = [state for state in self.state.values() if "d" in state]
        for name, value in zip(self.numbers_of_model, numbers, strict=True):
            write_each([state[name] for state in states], [value] * len(states))


def over_model(measured: list[Measured], terms: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The sums of these numbers, a tuple for each of `measured`, over the model: on the device of the first."""
    device = measured[0].numel.device
    return torch.stack([torch.stack(own).to(device) for own in terms]).sum(0)


def check_estimate(group: dict[str, Any]) -> None:
    """Raise ValueError where what an estimate begins with, or grows by, is out of range."""
    check_positive("d0", group["d0"])
    if not group["growth_rate"] >= 1:
        raise ValueError(f"Invalid growth_rate: {group['growth_rate']}. It must be at least 1.")


class DAdapts(EstimatesDistance):
    """The estimate of D-Adaptation, of weighted sums.

    The measure sums, of each parameter, its part of the numerator and of the denominator. Of the scalars ``weight`` and
    ``counts`` multiply these, the numerator is a running mean by ``decay``, and the estimate grows to at most
    ``growth_rate`` times itself.
    """

    kept_states: ClassVar[tuple[State, ...]] = (State("d"), State("numerator_weighted"))

    def total(self, measured: list[Measured]) -> None:
        """Estimate anew, for the next step."""
        if not measured:
            return
        h = measured[0].h
        d, numerator = self.kept_numbers(measured[0])
        terms = [(m.h.weight * m.sums[0].sum(), m.h.counts * m.sums[1].sum()) for m in measured]
        inner, size = over_model(measured, terms).unbind()
        new = h.decay * numerator + (1 - h.decay) * inner
        found = new / ((1 - h.decay) * torch.where(size > 0, size, 1.0))
        self.keep_numbers(grown(d, found, size > 0, h.growth_rate), torch.where(size > 0, new, numerator))

    def factors(self, measured: Measured) -> dict[str, Any]:
        return {}


def grown(d: Tensor, found: Tensor, there: Tensor, growth_rate: Any) -> Tensor:
    """The estimate, where what was found is larger, but at most so many times as large. NaN is not."""
    longest = d * growth_rate
    return torch.where(there & (found > d), torch.where(found < longest, found, longest), d)
