"""Swaps the averages of the weights in for the weights, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine, Swap
from ..precision.kept import check_state
from ..spec import AVERAGE, COUNT, WEIGHTS, Update, averages
from ..util.layout import is_sharded, local, with_local


def averaged(optimizer: Update) -> list[tuple[Tensor, dict[str, Any]]]:
    """The parameters that have averages, with their states.

    Raises:
        RuntimeError: an average is not its parameter's.
    """
    found = []
    params = [(p, averages(group)) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, kept) in enumerate(params):
        state = optimizer.state.get(p, {})
        # An average of no values is what the parameter was when the state was made.
        if kept and state.get(AVERAGE) is not None and float(state.get(COUNT, 0)):
            check_state(optimizer, i, p, AVERAGE, state)
            found.append((p, state))
    return found


@contextmanager
def averaged_parameters(optimizer: Update, engine: Engine) -> Iterator[None]:
    """See :meth:`RuleOptimizer.averaged_parameters`."""
    if engine.swapped == "averaged_parameters()":
        raise RuntimeError("averaged_parameters() is entered already: leave it first.")
    if not any(map(averages, optimizer.param_groups)):
        raise RuntimeError(f"{engine.name} keeps no averages. Give it ema_decay, such as ema_decay=0.999.")
    if engine.swapped == "eval()":
        yield
        return
    own = averaged(optimizer)
    kept = [local(p).detach().clone() for p, _ in own]
    engine.swapped = "averaged_parameters()"
    try:
        with torch.no_grad():
            for p, state in own:
                local(p).copy_(local(state[AVERAGE]))
        yield
    finally:
        with torch.no_grad():
            for (p, _), before in zip(own, kept, strict=True):
                local(p).copy_(before)
        engine.swapped = None


@torch.no_grad()
def swap_in(optimizer: Update, engine: Engine) -> None:
    """See :meth:`RuleOptimizer.eval`."""
    if engine.swapped is not None:
        return
    engine.forget_probe()
    for p, state in averaged(optimizer):
        if WEIGHTS not in state:  # a parameter that is listed twice
            state[WEIGHTS] = with_local(p, local(p).detach().clone())
            local(p).copy_(local(state[AVERAGE]))
            engine.swapped = "eval()"


@torch.no_grad()
def swap_back(optimizer: Update, engine: Engine) -> None:
    """See :meth:`RuleOptimizer.train`."""
    if engine.swapped != "eval()":
        return
    own = [(p, state) for p, state in optimizer.state.items() if WEIGHTS in state]
    numbers: dict[Any, Any] = {p: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for p, state in own:
        check_state(optimizer, numbers.get(p, "that is in no group"), p, WEIGHTS, state)
    for p, state in own:
        local(p).copy_(local(state.pop(WEIGHTS)))
    engine.swapped = None


def swapped_as_saved(optimizer: Update) -> Swap | None:
    """How the parameters are that belong to states as they were loaded."""
    return "eval()" if any(WEIGHTS in state for state in optimizer.state.values()) else None


def check_loadable(optimizer: Update, engine: Engine) -> None:
    """Raise RuntimeError where a state dict in evaluation mode could not be loaded again: distributed checkpoints load
    no state that a new optimizer has not.
    """
    if engine.swapped == "eval()" and any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            f"{engine.name}: state_dict() in evaluation mode, with sharded parameters. Call optimizer.train() first, "
            "and save the weights; under transformers' Trainer "
            'triton_optim.integrations.transformers.AveragedWeights(save="weights") does.'
        )
