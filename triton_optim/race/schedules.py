"""The learning rate over the steps of a run: a table of schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

WARMUP = 0.1  # share of the steps
Schedule = Callable[[Optimizer, int], Any]  # (optimizer, steps) -> what has a step()


def share(factor: Callable[[float], float], warmup: float = 0.0) -> Schedule:
    """A schedule: `factor` of the share of the run that is done, after a linear warm-up."""

    def schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
        rising = int(warmup * steps)

        def at(step: int) -> float:
            if step < rising:
                return (step + 1) / (rising + 1)
            return factor((step - rising) / max(steps - rising, 1))

        return LambdaLR(optimizer, at)

    return schedule


def constant(done: float) -> float:
    """1."""
    return 1.0


def linear(done: float) -> float:
    """From 1 to 0 on a line."""
    return 1 - done


def cosine(done: float) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * done)) / 2


def onecycle(optimizer: Optimizer, steps: int) -> OneCycleLR:
    """torch's OneCycleLR up to the learning rate; it moves beta1, or a momentum that is not 0, the other way."""
    cycles = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, cycle_momentum=cycles)


SCHEDULES: dict[str, Schedule] = {
    "constant": share(constant),
    "linear": share(linear),
    "cosine": share(cosine),
    "warmup": share(constant, WARMUP),
    "warmup_linear": share(linear, WARMUP),
    "warmup_cosine": share(cosine, WARMUP),
    "onecycle": onecycle,
}
