"""The built-in tasks, by name."""

from __future__ import annotations

from typing import Any

import torch

from ..util.named import cause_of
from .charlm import charlm
from .digits import digits
from .names import RaceError, resolve
from .quadratic_deep import quadratic_deep
from .task import MakeTask, Task

TASKS: dict[str, MakeTask] = {"digits": digits, "charlm": charlm, "quadratic_deep": quadratic_deep}


def task_named(task: str | MakeTask) -> tuple[str, MakeTask]:
    """A task's name, and the function that makes it."""
    if not isinstance(task, str):
        return getattr(task, "__qualname__", repr(task)), task
    return task, resolve("task", task, TASKS)


def made(name: str, make: MakeTask, seed: int) -> Task:
    """The task for a seed; nothing changes in torch's generator.

    Raises:
        RaceError: the function raised something, or what it gives is no task.
    """
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            task: Any = make(seed)
    except RaceError:
        raise
    except Exception as error:
        raise RaceError(f"The task {name!r} cannot be made: it raised {cause_of(error)} for seed {seed}.") from error
    if not isinstance(task, Task):
        raise RaceError(
            f"The task {name!r} gave {type(task).__name__} for seed {seed}. Return a triton_optim.race.Task from it."
        )
    return task
