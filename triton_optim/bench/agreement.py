"""Whether two optimizers compute the same: no ratio of their times means anything otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.convert import master
from ..core.optimizer import RuleOptimizer
from .peers import first_line

STEPS = 3
# How much of the update, on average, rounding explains: in 16 bits some sides round every intermediate result. Of torch
# and other packages on 13 optimizers it was at most 4e-7 in float32 and 4e-2, of which 5e-2 are taken off, in bfloat16.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part.

    Attributes:
        name: of the side.
        optimizer: it.
        params: what it updates, with gradients.
        step: a step of it.
        share: how much of the update its results may differ by; None is what rounding explains.
    """

    name: str
    optimizer: Optimizer
    params: Sequence[Tensor]
    step: Callable[[], Any]
    share: float | None = None


@dataclass(frozen=True)
class Difference:
    """How far a contender's results are from those of the first one.

    Attributes:
        share: mean absolute difference over mean absolute change, of the tensor where it is largest. Where a tensor's
            change is less than that of the whole model, the latter is taken.
        allowed: what is still taken for the same.
        error: what its step raised; empty if nothing.
    """

    share: float
    allowed: float
    error: str = ""

    @property
    def same(self) -> bool:
        """Whether it may be compared. NaN is not the same as anything."""
        return not self.error and self.share <= self.allowed

    def reason(self) -> str:
        """Why it may not be compared."""
        if self.error:
            return f"its step failed: {self.error}"
        found = f"they differ by {100 * self.share:.3g}% of the update after {STEPS} steps"
        return f"results disagree: {found} ({100 * self.allowed:g}% is allowed)"


def differences(contenders: Sequence[Contender], seed: int = 1) -> dict[str, Difference]:
    """Step them all with the same gradients, new ones each time, and compare the others with the first.

    Their parameters must be equal. What a dtype cannot show is no difference: the roundings of the parameters are
    taken off.
    """
    first, *others = contenders
    start = [p.detach().clone() for p in first.params]
    generator = torch.Generator(start[0].device).manual_seed(seed)
    errors: dict[str, str] = {}
    for _ in range(STEPS):
        for same in zip(*(c.params for c in contenders), strict=True):
            gradient = torch.randn(same[0].shape, generator=generator, device=same[0].device)
            for p in same:
                assert p.grad is not None
                p.grad.copy_(gradient)
        for contender in contenders:
            if contender.name not in errors:
                try:
                    with warnings.catch_warnings():
                        if contender is not first:
                            warnings.simplefilter("ignore")
                        contender.step()
                except Exception as error:  # whatever another package raises
                    if contender is first:
                        raise
                    errors[contender.name] = first_line(error)
    return {other.name: difference(first, other, start, errors.get(other.name, "")) for other in others}


def assert_agree(contenders: Sequence[Contender]) -> None:
    """Raise AssertionError unless all compute what the first one does."""
    wrong = [f"{name}: {found.reason()}" for name, found in differences(contenders).items() if not found.same]
    assert not wrong, "; ".join(wrong)


def difference(first: Contender, other: Contender, start: Sequence[Tensor], error: str) -> Difference:
    """How far `other` is from `first`, both having stepped from `start`."""
    dtype = start[0].dtype
    allowed = max(c.share or ROUNDING[dtype] for c in (first, other))
    if error:
        return Difference(float("nan"), allowed, error)
    off, changes, counts = [], [], []
    for p, q, before in zip(first.params, other.params, start, strict=True):
        if p.numel() > 0:
            expected = weights(first, p)
            apart = (weights(other, q) - expected).abs().mean()
            # Half a step of the dtype at each rounding.
            rounding = STEPS * torch.finfo(dtype).eps / 2 * expected.abs().mean()
            off.append((apart - rounding).clamp(min=0))
            changes.append((expected - before.to(expected.dtype)).abs().mean())
            counts.append(p.numel())
    weight = torch.tensor(counts, dtype=torch.float64)
    change = torch.stack(changes).cpu().double()
    # The steps of a small tensor may cancel: what it is off by is then no larger than elsewhere.
    usual = (change * weight).sum() / weight.sum()
    return Difference((torch.stack(off).cpu().double() / change.clamp(min=usual)).max().item(), allowed)


def weights(contender: Contender, p: Tensor) -> Tensor:
    """A parameter as exactly as its optimizer keeps it."""
    kept = master(p, contender.optimizer) if isinstance(contender.optimizer, RuleOptimizer) else p.detach()
    return kept if kept.dtype == torch.float64 else kept.float()
