"""The best learning rate by Optuna: one study for each optimizer and schedule, which any number of processes share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from .contestants import Contestant
from .names import RaceError, require
from .records import FINISHED, Record, Run, digest
from .runs import Race

if TYPE_CHECKING:
    import optuna

REACH = 30  # how many times the usual learning rate, and which part of it, is tried
STARTUP = 3  # trials, at the usual learning rate and near both ends, before the sampler chooses and any is pruned
ATTEMPTS = 10  # to open a new storage, whose tables another process may be making
HEARTBEAT, GRACE = 30, 90  # seconds; the trial of a process that died is given up after GRACE


def tuned(race: Race, lrs: Sequence[float], seeds: int, trials: int, storage: str | None) -> list[Record]:
    """The records of all trials, and those of the best learning rate of each contestant and schedule."""
    pairs = [(c, schedule) for c in race.contestants for schedule in race.schedules]
    race.watcher.planned({c.label: len(race.schedules) * (trials + seeds) for c in race.contestants})
    usual = [Run(c, schedule, c.usual_lr, 0) for c, schedule in pairs]  # which is the first trial
    race.check(run for run in usual if race.record(run) is None)
    records, best = [], []
    with closing(Search(race, lrs, trials, storage)) as search:
        for c, schedule in pairs:
            tried, lr = search.best_lr(c, schedule)
            records += tried
            best += [Run(c, schedule, lr, seed) for seed in range(seeds)] if lr else []
            if lr is None:
                race.watcher.skipped(c.label, seeds)
    best.sort(key=lambda run: run.seed)
    seen = {(r.optimizer, r.schedule, r.lr, r.seed): r for r in records}
    seen.update({(r.optimizer, r.schedule, r.lr, r.seed): r for r in map(race.perform, best)})
    return list(seen.values())


class Search:
    """Searches of a race, in one storage.

    Args:
        race: what to train on, and where records are kept.
        lrs: the smallest and the largest learning rate are the ends of the search; empty takes the usual ones.
        trials: how many, of all processes together, for each optimizer and schedule.
        storage: a URL of a database; None is a file in the folder of the race, or memory if it has none.

    Raises:
        RaceError: Optuna is missing, or the storage cannot be used.
    """

    def __init__(self, race: Race, lrs: Sequence[float], trials: int, storage: str | None) -> None:
        require(["optuna"], "Tuning")
        self.race, self.lrs, self.trials = race, lrs, trials
        folder = race.store.folder
        if storage is None and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{folder / 'study.db'}"
        self.storage = opened(storage)

    def close(self) -> None:
        """Let go of the database: Python warns of one that is open when it is collected."""
        if hasattr(self.storage, "engine"):
            self.storage.remove_session()
            self.storage.engine.dispose()

    def best_lr(self, contestant: Contestant, schedule: str) -> tuple[list[Record], float | None]:
        """The records of all trials that were made here, and the best learning rate; None if all diverged."""
        import optuna

        low, high = self.ends(contestant)
        if low == high:
            self.race.watcher.skipped(contestant.label, self.trials)
            return [], low
        content = self.race.search_content(contestant, schedule)
        name = f"{self.race.name} {contestant.label} {schedule} {digest([content, low, high])}"
        pruner = optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=2)
        with quiet():
            try:
                study = optuna.create_study(storage=self.storage, study_name=name, pruner=pruner)
            except optuna.exceptions.DuplicatedStudyError:
                study = optuna.load_study(storage=self.storage, study_name=name, pruner=pruner)
            else:
                for lr in (contestant.usual_lr, *(low * (high / low) ** (n / 6) for n in (5, 1))):
                    study.enqueue_trial({"lr": min(max(lr, low), high)})
            made = self.search(study, contestant, schedule, (low, high))
            tried = [t for t in study.trials if t.state in (states().COMPLETE, states().PRUNED)]
        self.race.watcher.skipped(contestant.label, self.trials - made)
        runs = [Run(contestant, schedule, rounded(t.params["lr"]), 0) for t in tried]
        records = {run.lr: record for run in runs if (record := self.race.record(run)) is not None}
        complete = [t for t in tried if t.state == states().COMPLETE]
        best = min(complete, key=lambda t: float(t.value or 0.0), default=None)
        return list(records.values()), None if best is None else rounded(best.params["lr"])

    def search(self, study: optuna.Study, contestant: Contestant, schedule: str, ends: tuple[float, float]) -> int:
        """Make trials until all processes together have made enough; gives how many were made here."""
        import optuna

        made = 0

        def objective(trial: optuna.Trial) -> float:
            nonlocal made
            # By the trial's number: neither another process nor a race that goes on tries the same rates again.
            study.sampler = optuna.samplers.TPESampler(seed=trial.number, n_startup_trials=STARTUP)
            reported: set[int] = {0}
            run = Run(contestant, schedule, rounded(trial.suggest_float("lr", *ends, log=True)), 0)

            def judged(step: int, loss: float) -> bool:
                tenth = 10 * step // self.race.steps  # a report is a transaction, which may take 0.1 s
                if tenth in reported:
                    return False
                reported.add(tenth)
                trial.report(loss, tenth)
                return trial.should_prune()

            record = self.race.perform(run, judged)
            made += 1
            if record.status != FINISHED:
                raise optuna.TrialPruned
            return record.best

        while True:
            found = [trial.state for trial in study.get_trials(deepcopy=False)]
            done = found.count(states().COMPLETE) + found.count(states().PRUNED)
            running = found.count(states().RUNNING)
            if done >= self.trials and not running:
                return made
            if done + running < self.trials:
                study.optimize(objective, n_trials=1)
            else:  # others' trials: the best is known when they are done
                time.sleep(0.5)
                optuna.storages.fail_stale_trials(study)

    def ends(self, contestant: Contestant) -> tuple[float, float]:
        """The smallest and the largest learning rate to try."""
        given = contestant.lrs or tuple(self.lrs)
        usual = contestant.usual_lr
        return (min(given), max(given)) if given else (rounded(usual / REACH), rounded(usual * REACH))


def rounded(lr: float) -> float:
    """Three digits of a learning rate."""
    return float(f"{lr:.3g}")


def states() -> Any:
    """The states of Optuna's trials."""
    from optuna.trial import TrialState

    return TrialState


def opened(url: str | None) -> Any:
    """Optuna's storage at a URL, or in memory.

    Raises:
        RaceError: there is none and none can be made.
    """
    import optuna
    from sqlalchemy.exc import DBAPIError  # what Optuna keeps databases with

    if url is None:
        return optuna.storages.InMemoryStorage()
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for attempt in range(ATTEMPTS):
        try:
            with quiet():
                return optuna.storages.RDBStorage(
                    url, engine_kwargs=waits, heartbeat_interval=HEARTBEAT, grace_period=GRACE
                )
        except Exception as error:
            if attempt == ATTEMPTS - 1 or not isinstance(error, DBAPIError):
                cause = str(error).splitlines()[0]
                raise RaceError(
                    f"The storage {url} cannot be used: {type(error).__name__}: {cause}. "
                    "Give a URL such as sqlite:///race.db."
                ) from error
            time.sleep(0.1)
    raise AssertionError


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's lines about trials, interrupted ones too, and its warning that heartbeats are new."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
