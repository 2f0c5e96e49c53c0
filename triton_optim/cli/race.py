"""`triton-optim race`: optimizers and schedules on a task, from the same weights; a table and a picture."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from ..race import RaceError, Results, race
from ..race.contestants import checked_lrs, read_options, split_names
from ..race.event import DEFAULT_SCHEDULES, OPTIMIZERS
from ..race.names import as_race_error, require
from ..race.page import page
from ..race.schedules import SCHEDULES
from ..race.tasks import TASKS
from ..registry import optimizers
from ..util.files import write_json
from ..util.provenance import provenance
from .options import check_files, command_line
from .terminal import open_console, say

INTERRUPTED = 130  # what shells give for SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    own, add = "or your own, as mymodule:name", parser.add_argument
    known = f"{', '.join(sorted(optimizers()))}, {own}; with options as in 'sgd(momentum=0.9,lr=(0.1,0.3))'; or all"
    defaults = f"the task's, else {','.join(OPTIMIZERS)}"
    rates = "such as 1e-4,3e-4,1e-3; with --tune the ends of the search (default: around the usual)"
    storage = "of the trials, such as sqlite:///race.db: all who race with it share them"
    out = "of the records: the same command goes on from them (default: %(default)s)"
    add("--task", default="digits", help=f"{', '.join(TASKS)}, {own} (default: %(default)s)")
    add("--optimizers", metavar="NAMES", help=f"{known} (default: {defaults})")
    schedules = f"{', '.join(SCHEDULES)}, {own} (default: the task's, else {','.join(DEFAULT_SCHEDULES)})"
    add("--schedules", metavar="NAMES", help=schedules)
    add("--lrs", default="", metavar="NUMBERS", help=f"learning rates, {rates}")
    tune = "search lr with N trials of Optuna an optimizer and schedule"
    add("--tune", type=int, default=0, metavar="N", help=tune)
    add("--storage", metavar="URL", help=storage)
    add("--seeds", type=int, metavar="N", help="how many (default: the task's, else 3)")
    add("--steps", type=int, metavar="N", help="of each run (default: the task's)")
    settings = "begin with settings of published benchmarks, options and learning rate"
    add("--published", action="store_true", help=settings)
    option = "an option of all optimizers, weight_decay=0.1"
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=option)
    add("--target", type=float, metavar="LOSS", help="tell the time to this loss (default: what all who learn reach)")
    add("--device", help="where to train (default: a GPU if there is one, else cpu)")
    add("--out", type=Path, default=Path("triton_optim_race"), metavar="DIR", help=out)
    add("--plot", type=Path, metavar="FILE", help="where the picture goes (default: race.png in --out)")
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")


def run(args: argparse.Namespace) -> int:
    """Run the race; 0 if it came to its end, 1 if it cannot start, 130 if it was interrupted."""
    try:
        require(["rich", "matplotlib", *(["optuna"] if args.tune else [])], "triton-optim race")
        options = asked(args)
        from .race_terminal import Board, print_results

        console = open_console()
        with Board(console) as board:
            results = race(**options, watcher=board)
        plot = args.plot or args.out / "race.png"
        results.figure().savefig(plot)
        report = args.out / "report.html"
        report.write_text(page(results), encoding="utf-8")
        print_results(console, results)
        say(console, f"\nPicture: {plot}\nPage: {report}\nRecords of all runs: {args.out / 'runs'}")
        if args.json is not None:
            write_json(args.json, record(args, results), allow_nan=False)
            say(console, f"Everything measured: {args.json}")
    except (RaceError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. The same command goes on from the runs in {args.out}.", file=sys.stderr)
        return INTERRUPTED
    return 0


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `race` that the options stand for.

    Raises:
        RaceError: one has no usable value.
    """
    if args.target is not None and not math.isfinite(args.target):
        raise RaceError(f"--target {args.target} is no loss that can be reached. Give a number.")
    with as_race_error():
        check_files(args.plot, args.json)
    try:
        lrs = [float(lr) for lr in args.lrs.split(",") if lr.strip()]
    except ValueError:
        raise RaceError(f"--lrs {args.lrs}: not all of it are numbers. Write it as 1e-4,3e-4,1e-3.") from None
    return {
        "task": args.task,
        "optimizers": None if args.optimizers is None else split_names(args.optimizers),
        "schedules": None if args.schedules is None else split_names(args.schedules),
        "lrs": checked_lrs(f"--lrs {args.lrs}", lrs),
        "tune": args.tune,
        "storage": args.storage,
        "seeds": args.seeds,
        "steps": args.steps,
        "options": read_options(f"--set {' --set '.join(args.set)}", f"({','.join(args.set)})"),
        "published": args.published,
        "target": args.target,
        "device": args.device,
        "out": args.out,
    }


def record(args: argparse.Namespace, results: Results) -> dict[str, Any]:
    """What `--json` writes."""
    return {"command": command_line("race", args), **provenance(torch.device(results.device)), **results.as_dict()}
