"""What a run leaves behind: a record in a file of its own, found again by what the run was."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import triton_optim

from ..util.files import write_whole
from .contestants import Contestant
from .names import RaceError

FINISHED, DIVERGED, PRUNED = "finished", "diverged", "pruned"


@dataclass(frozen=True)
class Run:
    """One training: who, under which schedule, from which learning rate, with which seed."""

    contestant: Contestant
    schedule: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.contestant.label}, {self.schedule}, lr {self.lr:g}, seed {self.seed}"


def versions() -> dict[str, str]:
    """With what the numbers were made."""
    return {
        "torch": torch.__version__,
        "triton-optim": triton_optim.__version__,
        "python": platform.python_version(),
        "machine": platform.node(),
    }


@dataclass(frozen=True)
class Record:
    """What was measured in one run. Everything in it is a finite number: curves end before a loss that is not.

    Attributes:
        optimizer, schedule, lr, seed: which run it was.
        status: ``"finished"``; ``"diverged"``, a loss was NaN or infinite; or ``"pruned"``, Optuna ended it.
        steps: optimizer steps that were taken.
        losses, lrs: of every step, the loss of its batch and the learning rate (of the first parameter group).
        judged_at, validation, seconds: after how many steps the validation loss was taken, that loss, and how long all
            steps until then took, without validation and without compiling before the first.
        step_seconds, whole_seconds: of every step: ``optimizer.step()`` without a closure's evaluations; and all of it.
        state_bytes, parameters: what the optimizer kept in the end, and of how many elements.
        versions: of torch, triton-optim and Python, and the machine.
    """

    optimizer: str
    schedule: str
    lr: float
    seed: int
    status: str
    steps: int
    losses: list[float]
    lrs: list[float]
    judged_at: list[int]
    validation: list[float]
    seconds: list[float]
    step_seconds: list[float]
    whole_seconds: list[float]
    state_bytes: int
    parameters: int
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def best(self) -> float:
        """The lowest validation loss."""
        return min(self.validation, default=float("inf"))


def source_of(thing: Callable[..., Any]) -> str:
    """The file that `thing` is written in, or, in a notebook, its own text: a changed one makes other runs."""
    module = sys.modules.get(getattr(thing, "__module__", ""))
    file = getattr(module, "__file__", None)
    if file and Path(file).suffix == ".py":
        return Path(file).read_text(encoding="utf-8")
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def digest(what: Any) -> str:
    """A short name that is equal for equal contents."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:20]


@dataclass
class Store:
    """The records of a folder, each in ``runs/<key>.json``; without a folder, in memory.

    A file is there whole or not at all: it is written beside its place and then moved there.
    """

    folder: Path | None
    kept: dict[str, Record] = field(default_factory=dict)

    def path(self, key: str) -> Path | None:
        """Where the record of a key is kept."""
        return None if self.folder is None else self.folder / "runs" / f"{key}.json"

    def get(self, key: str) -> Record | None:
        """The record of a key, if there is one.

        Raises:
            RaceError: its file is no record.
        """
        path = self.path(key)
        if key not in self.kept and path is not None and path.exists():
            try:
                self.kept[key] = Record(**json.loads(path.read_text(encoding="utf-8"))["record"])
            except (ValueError, KeyError, TypeError) as error:
                raise RaceError(
                    f"{path} holds no record of a run ({error}). Delete it; the run is made again."
                ) from None
        return self.kept.get(key)

    def put(self, key: str, what: dict[str, Any], record: Record) -> None:
        """Keep a record, and beside it what the run was."""
        path = self.path(key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"run": what, "record": asdict(record)}, allow_nan=False, default=str))
        self.kept[key] = record
