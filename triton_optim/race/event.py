"""A whole race: which runs it has, and that each is made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..util.devices import usable_device
from .contestants import ALL, Contestant, OwnOptimizer, contestant, everyone
from .names import RaceError, as_race_error, resolve
from .records import Store
from .results import Results
from .runs import Race, Watcher
from .schedules import SCHEDULES
from .task import MakeTask
from .tasks import made, task_named
from .tuning import tuned

OPTIMIZERS = ("adamw", "lion", "muon")
DEFAULT_SCHEDULES = ("constant", "cosine")


def race(
    task: str | MakeTask,
    optimizers: Sequence[str | OwnOptimizer | Contestant] | None = None,
    schedules: Sequence[str] | None = None,
    lrs: Sequence[float] = (),
    *,
    tune: int = 0,
    storage: str | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    options: Mapping[str, Any] | None = None,
    published: bool = False,
    target: float | None = None,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    watcher: Watcher | None = None,
) -> Results:
    """Train a task with each optimizer, schedule, learning rate and seed, and compare.

    For a seed all begin with the same weights and see the same batches. A run whose loss is NaN or infinite is recorded
    as diverged, and the race goes on. Each run's record is a file in ``out/runs``: an interrupted race goes on where it
    stopped when it is called again, and a run of another task, source, option or number of steps is another run.

    Args:
        task: ``"digits"``, ``"charlm"``, ``"quadratic_deep"``, ``"mymodule:task"``, or a function that gives a
            :class:`Task` for a seed.
        optimizers: names in lower case, ``"mymodule:MyOptimizer"``, either with options as in
            ``"sgd(momentum=0.9, lr=(0.03, 0.1))"``; or classes. ``"all"`` is every optimizer here but `SparseAdam` and
            those that call the closure. By default the task's own, else AdamW, Lion and Muon.
        schedules: names, or ``"mymodule:schedule"``, which is called with the optimizer and the number of steps. By
            default the task's own, else constant and cosine.
        lrs: learning rates to try; by default three around the one that is usual for the optimizer: on the task, else
            in a published benchmark, else the default of its class; the results say which. With `tune`, the smallest
            and the largest to try; by default a thirtieth of the usual one, and thirty times that.
        tune: instead of all `lrs`, so many trials of Optuna with the first seed for each optimizer and schedule, of
            which those that lag are pruned; the best learning rate then runs with all seeds.
        storage: where the trials are kept, such as ``"sqlite:///race.db"``: processes and machines that race with the
            same one share the trials. By default a file in `out`.
        seeds: how many seeds, from 0 on; by default the task's.
        steps: of each run; by default the task's.
        options: keywords of all optimizers, such as ``{"weight_decay": 0.1}``.
        published: begin with the settings that a benchmark or paper published (`triton_optim.race.settings`), options
            and learning rate; `options` and those in names come first.
        target: a validation loss; the time to it is told. By default one that all who learn reach, see `Results`.
        device: where to train; by default a GPU where there is one.
        out: the folder of the records; None keeps them in memory.
        watcher: is told how it goes.

    Raises:
        RaceError: a name or a number is wrong, an extra is missing, or an optimizer cannot take a step on the task.
    """
    name, make = task_named(task)
    first = made(name, make, 0)
    optimizers = first.optimizers or OPTIMIZERS if optimizers is None else optimizers
    schedules = first.schedules or DEFAULT_SCHEDULES if schedules is None else schedules
    seeds = first.seeds if seeds is None else seeds
    named = [one for given in optimizers for one in (everyone() if given == ALL else [given])]
    field = [contestant(given, options).starting(first, published) for given in named]
    check_numbers(field, schedules, tune, seeds, steps, storage)
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise RaceError(f"The race cannot be kept in {out}: it is a file. Name a folder.")
    with as_race_error():
        chosen = usable_device("The device", device)
    own = Race(
        name=name,
        make=make,
        contestants=field,
        schedules={given: resolve("schedule", given, SCHEDULES) for given in schedules},
        steps=steps or first.steps,
        device=chosen,
        store=Store(None if out is None else Path(out)),
        watcher=watcher or Watcher(),
    )
    records = own.grid(lrs, seeds) if not tune else tuned(own, lrs, seeds, tune, storage)
    remarks = {c.label: c.remarks(first, lrs) for c in field}
    beside = first.published if own.steps == first.steps else ()
    return Results(name, own.steps, seeds, str(own.device), records, target, remarks, beside)


def check_numbers(
    field: Sequence[Contestant], schedules: Sequence[str], tune: int, seeds: int, steps: int | None, storage: str | None
) -> None:
    """Find what would make the race empty or ambiguous.

    Raises:
        RaceError: so it is.
    """
    for what, given in (("optimizers", [c.label for c in field]), ("schedules", list(schedules))):
        if not given:
            raise RaceError(f"A race without {what} has no runs. Give at least one.")
        if doubled := sorted({one for one in given if given.count(one) > 1}):
            raise RaceError(f"{', '.join(doubled)} stands twice among the {what}. Leave one of them out.")
    for number, least, what in ((seeds, 1, "seeds"), (steps, 2, "steps"), (tune, 0, "trials to tune with")):
        if number is not None and number < least:
            raise RaceError(f"{number} {what} are too few. Give {least} or more.")
    if storage is not None and not tune:
        raise RaceError(f"The storage {storage} is for trials, and there are none. Tune with 30, for one.")
