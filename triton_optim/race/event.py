"""A whole race: which runs it has, and that each is made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..named import cause_of
from .contestants import Contestant, OwnOptimizer, contestant
from .names import RaceError
from .records import PRUNED, Record, Run, Store, digest, source_of
from .results import Results
from .schedules import Schedule, schedule_named
from .task import MakeTask
from .tasks import made, task_named
from .training import Judged, train


class Watcher:
    """Is told how a race goes on; this one does nothing with it."""

    def planned(self, runs: Mapping[str, int]) -> None:
        """How many runs each contestant will have, by its label."""

    def started(self, run: Run, steps: int) -> None:
        """A run begins."""

    def judged(self, run: Run, step: int, loss: float) -> None:
        """The validation loss after `step` steps."""

    def ended(self, run: Run, record: Record, again: bool) -> None:
        """A run is done; `again` if its record was already there."""

    def skipped(self, label: str, runs: int) -> None:
        """Some of a contestant's runs were made elsewhere."""


def race(
    task: str | MakeTask,
    optimizers: Sequence[str | OwnOptimizer | Contestant],
    schedules: Sequence[str] = ("constant", "cosine"),
    lrs: Sequence[float] = (),
    *,
    tune: int = 0,
    storage: str | None = None,
    seeds: int = 3,
    steps: int | None = None,
    options: Mapping[str, Any] | None = None,
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
        task: ``"digits"``, ``"charlm"``, ``"mymodule:task"``, or a function that gives a :class:`Task` for a seed.
        optimizers: names in lower case, ``"mymodule:MyOptimizer"``, either with options as in
            ``"sgd(momentum=0.9, lr=(0.03, 0.1))"``; or classes.
        schedules: names, or ``"mymodule:schedule"``, which is called with the optimizer and the number of steps.
        lrs: learning rates to try; by default three around the one that is usual for the optimizer. With `tune`, the
            smallest and the largest to try; by default a thirtieth of the usual one, and thirty times that.
        tune: instead of all `lrs`, so many trials of Optuna with the first seed for each optimizer and schedule, of
            which those that lag are pruned; the best learning rate then runs with all seeds.
        storage: where the trials are kept, such as ``"sqlite:///race.db"``: processes and machines that race with the
            same one share the trials. By default a file in `out`.
        seeds: how many seeds, from 0 on.
        steps: of each run; by default the task's.
        options: keywords of all optimizers, such as ``{"weight_decay": 0.1}``.
        target: a validation loss; the time to it is told. By default one that all who learn reach, see `Results`.
        device: where to train; by default a GPU where there is one.
        out: the folder of the records; None keeps them in memory.
        watcher: is told how it goes.

    Raises:
        RaceError: a name or a number is wrong, an extra is missing, or an optimizer cannot take a step on the task.
    """
    name, make = task_named(task)
    field = [contestant(given, options) for given in optimizers]
    check_numbers(field, schedules, tune, seeds, steps, storage)
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise RaceError(f"The race cannot be kept in {out}: it is a file. Name a folder.")
    default_steps = made_with_seed(name, make, 0).steps
    own = Race(
        name=name,
        make=make,
        contestants=field,
        schedules={given: schedule_named(given) for given in schedules},
        steps=steps or default_steps,
        device=chosen_device(device),
        store=Store(None if out is None else Path(out)),
        watcher=watcher or Watcher(),
    )
    records = own.grid(lrs, seeds) if not tune else own.tuned(lrs, seeds, tune, storage)
    return Results(name, own.steps, seeds, str(own.device), records, target)


def check_numbers(
    field: Sequence[Contestant],
    schedules: Sequence[str],
    tune: int,
    seeds: int,
    steps: int | None,
    storage: str | None,
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


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device that is named, or a GPU where there is one, or the CPU.

    Raises:
        RaceError: it cannot be used.
    """
    try:
        chosen = torch.device(device or (torch.accelerator.current_accelerator(check_available=True) or "cpu"))
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise RaceError(f"The device {device} cannot be used: {cause}. Leave it out to choose automatically.") from None
    return chosen


def made_with_seed(name: str, make: MakeTask, seed: int) -> Any:
    """The task for a seed, and nothing changed in torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return made(name, make, seed)


@dataclass
class Race:
    """Who races on what, where records are kept, and who watches."""

    name: str
    make: MakeTask
    contestants: list[Contestant]
    schedules: dict[str, Schedule]
    steps: int
    device: torch.device
    store: Store
    watcher: Watcher

    def grid(self, lrs: Sequence[float], seeds: int) -> list[Record]:
        """The records of every contestant, schedule, learning rate and seed; a seed of all comes before the next."""
        pairs = [(c, schedule) for c in self.contestants for schedule in self.schedules]
        runs = [Run(c, schedule, lr, s) for s in range(seeds) for c, schedule in pairs for lr in c.grid(lrs)]
        self.watcher.planned({c.label: sum(run.contestant is c for run in runs) for c in self.contestants})
        self.check(run for run in runs if self.record(run) is None)
        return [self.perform(run) for run in runs]

    def tuned(self, lrs: Sequence[float], seeds: int, trials: int, storage: str | None) -> list[Record]:
        """The records of all trials, and those of the best learning rate of each contestant and schedule."""
        from .tuning import Search

        pairs = [(c, schedule) for c in self.contestants for schedule in self.schedules]
        self.watcher.planned({c.label: len(self.schedules) * (trials + seeds) for c in self.contestants})
        usual = [Run(c, schedule, c.usual_lr, 0) for c, schedule in pairs]  # which is the first trial
        self.check(run for run in usual if self.record(run) is None)
        search = Search(self, lrs, trials, storage)
        records, best = [], []
        for c, schedule in pairs:
            tried, lr = search.best_lr(c, schedule)
            records += tried
            best += [Run(c, schedule, lr, seed) for seed in range(seeds)] if lr else []
            if lr is None:
                self.watcher.skipped(c.label, seeds)
        best.sort(key=lambda run: run.seed)
        seen = {(r.optimizer, r.schedule, r.lr, r.seed): r for r in records}
        seen.update({(r.optimizer, r.schedule, r.lr, r.seed): r for r in map(self.perform, best)})
        return list(seen.values())

    def check(self, runs: Iterable[Run]) -> None:
        """Take two steps with each contestant and schedule of the runs: what fails, fails before hours are spent.

        Raises:
            RaceError: so it did.
        """
        for run in {(run.contestant.label, run.schedule): run for run in runs}.values():
            try:
                self.train(replace(run, seed=0), 2, lambda step, loss: False)
            except RaceError:
                raise
            except Exception as error:
                who = f"{run.contestant.label} with the schedule {run.schedule}"
                raise RaceError(f"{who} cannot take a step on {self.name}: {cause_of(error)}") from error

    def perform(self, run: Run, judged: Judged | None = None) -> Record:
        """The record of a run, which is made if it is not there; a pruned one is made again where nothing judges.

        Args:
            run: which run.
            judged: may end the run, see `train`.
        """
        record = self.record(run)
        again = record is not None and (record.status != PRUNED or judged is not None)
        if record is None or not again:
            self.watcher.started(run, self.steps)

            def watched(step: int, loss: float) -> bool:
                self.watcher.judged(run, step, loss)
                return judged is not None and judged(step, loss)

            record = self.train(run, self.steps, watched)
            self.store.put(self.key(run), self.content(run), record)
        self.watcher.ended(run, record, again)
        return record

    def train(self, run: Run, steps: int, judged: Judged) -> Record:
        """Make a run, of so many steps."""
        task = made_with_seed(self.name, self.make, run.seed)
        return train(run, task, self.schedules[run.schedule], steps, self.device, judged)

    def record(self, run: Run) -> Record | None:
        """The record of a run, if it was made."""
        return self.store.get(self.key(run))

    def key(self, run: Run) -> str:
        """A name that is another one for every run that would give other numbers."""
        return digest(self.content(run))

    def content(self, run: Run) -> dict[str, Any]:
        """What a run depends on."""
        return {**self.search_content(run.contestant, run.schedule), "lr": run.lr, "seed": run.seed}

    def search_content(self, c: Contestant, schedule: str) -> dict[str, Any]:
        """What a search for the best learning rate depends on."""
        return {
            "task": [self.name, digest(source_of(self.make))],
            "optimizer": [
                c.label,
                f"{c.build.__module__}.{getattr(c.build, '__qualname__', '')}",
                digest(source_of(c.build)),
            ],
            "options": dict(c.options),
            "schedule": [schedule, digest(source_of(self.schedules[schedule]))],
            "steps": self.steps,
            "device": self.device.type,
        }
