"""The experimenter's bench: optimizers and schedules race on a task, from the same weights, on the same batches.

``triton-optim race`` is this on the command line; in a notebook::

    from triton_optim.race import race

    results = race("digits", ["adamw", "lion", "sgd(momentum=0.9)"], schedules=["constant", "cosine"], out="race")
    print(results)
    results.figure()

A task of one's own is a function that takes a seed and gives a :class:`Task`; see there.
"""

from .contestants import Contestant
from .event import race
from .names import RaceError
from .records import Record
from .results import Results, Standing
from .runs import Watcher
from .task import Task

__all__ = ["Contestant", "RaceError", "Record", "Results", "Standing", "Task", "Watcher", "race"]
