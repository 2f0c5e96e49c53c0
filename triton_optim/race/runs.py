"""The runs of a race: each is made once, and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..util.named import cause_of
from .contestants import Contestant
from .names import RaceError
from .records import PRUNED, Record, Run, Store, digest, source_of
from .schedules import Schedule
from .task import MakeTask
from .tasks import made
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
        task = made(self.name, self.make, run.seed)
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
            "options": c.all_options,
            "schedule": [schedule, digest(source_of(self.schedules[schedule]))],
            "steps": self.steps,
            "device": self.device.type,
        }
