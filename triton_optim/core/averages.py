"""Swaps the averages of the weights in for the weights, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..engine.engine import Engine
from ..spec import AVERAGE, COUNT, Update, averages
from ..util.layout import local


@contextmanager
def averaged_parameters(optimizer: Update, engine: Engine) -> Iterator[None]:
    """See :meth:`RuleOptimizer.averaged_parameters`."""
    if engine.swapped:
        raise RuntimeError("averaged_parameters() is entered already: leave it first.")
    if not any(map(averages, optimizer.param_groups)):
        raise RuntimeError(f"{type(optimizer).__name__} keeps no averages. Give it ema_decay, such as ema_decay=0.999.")
    params = [p for group in optimizer.param_groups if averages(group) for p in group["params"]]
    # An average of no values is what the parameter was when the state was made.
    own = [(p, optimizer.state[p][AVERAGE]) for p in params if float(optimizer.state.get(p, {}).get(COUNT, 0))]
    kept = [local(p).detach().clone() for p, _ in own]
    engine.swapped = True
    try:
        with torch.no_grad():
            for p, average in own:
                local(p).copy_(local(average))
        yield
    finally:
        with torch.no_grad():
            for (p, _), before in zip(own, kept, strict=True):
                local(p).copy_(before)
        engine.swapped = False
