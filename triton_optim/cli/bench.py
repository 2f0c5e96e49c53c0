"""`triton-optim bench`: how long a step takes on a model of your choice, beside what you use now."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..bench.comparison import Case, Comparison, compare
from ..bench.models import NAMED, elements, own_shapes, shapes
from ..bench.peers import PEERS, Unavailable, check_peer
from ..bench.records import Record, write_file
from ..bench.room import SHARE, bytes_per_parameter, cut, fitting_models, free_bytes
from ..core.memory import gibibytes
from ..core.optimizer import RuleOptimizer
from ..dispatch import BACKENDS
from ..precision.codecs import PARAM_PRECISIONS
from ..registry import rule_optimizers
from ..util.devices import usable_device
from ..util.extras import require
from ..util.named import load
from ..util.table import short
from .bench_terminal import print_comparison
from .memory import DTYPES, STATES
from .options import check_files, chosen
from .terminal import open_console, progress_bar, say

ALL_DTYPES = {**DTYPES, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    own, peers = "mymodule:make_model", "torch-fused,torch-foreach,optimi"
    models = f"{', '.join(NAMED)}, COUNTxSIZE such as 500x20k, or {own} (default: resnet50)"
    against = f"{', '.join(PEERS)}, or mymodule:MyOptimizer (default: {peers})"
    wait = "to wait for other programs and repeat what they disturbed, for each case (default: 5)"
    add = parser.add_argument
    add("--optimizer", default="adamw,lion", metavar="NAMES", help="such as adamw,lion (default), or mymodule:MyRule")
    add("--model", default="resnet50", metavar="NAMES", help=models)
    add("--dtype", default="float32", metavar="NAMES", help=f"{', '.join(ALL_DTYPES)} (default: float32)")
    add("--backend", default="auto", metavar="NAMES", help=f"auto (default), {', '.join(BACKENDS)}")
    add("--against", default=peers, metavar="NAMES", help=against)
    add("--state", choices=STATES, default="none", help="state_dtype (default: none, the parameters')")
    add("--precision", choices=PARAM_PRECISIONS, default="storage", help="param_precision (default: storage)")
    add("--device", help="where (default: the GPU if there is one, else the CPU)")
    add("--rounds", type=int, default=5, help="of 0.6 s or more, in which all sides take turns (default: 5)")
    add("--patience", type=float, default=5.0, metavar="SECONDS", help=wait)
    add("--json", type=Path, metavar="FILE", help="write the samples to FILE, after each case")
    add("--plot", type=Path, metavar="FILE", help="draw the times to FILE: .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    """Print a table for each case; 1 if results disagree or if it cannot start, 130 if interrupted."""
    try:
        check_options(args)
        device = usable_device("--device", args.device)
        peers = args.against.split(",") if args.against else []
        backends = chosen("--backend", args.backend, ("auto", *BACKENDS))
        cases = [*chosen_cases(args, device, peers, backends)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    console = open_console()
    finished: list[Comparison] = []
    records: list[Record] = []
    status = 0
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("", total=len(cases) * args.rounds)
            for number, case in enumerate(cases):
                progress.update(task, description=case.name, completed=number * args.rounds)
                try:
                    comparison = compare(
                        case,
                        peers,
                        backends,
                        patience=args.patience,
                        rounds=args.rounds,
                        inner=1 if device.type == "cpu" else 10,
                        advance=lambda: progress.advance(task),
                    )
                except Unavailable as reason:
                    say(console, f"\n{case.name}: not measured: {reason}", style="bold")
                    records.append(Record("bench", case.name, f"not measured: {reason}", {}))
                else:
                    print_comparison(console, comparison)
                    status = 1 if comparison.disagreeing else status
                    finished.append(comparison)
                    records.append(comparison.record("bench"))
                save(args, records, device, interrupted=number + 1 < len(cases))
    except KeyboardInterrupt:
        say(console, f"\nInterrupted: {len(records)} of {len(cases)} cases were finished.", style="bold red")
        save(args, records, device, interrupted=True)
        status = 130
    if args.plot is not None and finished:
        from ..bench.picture import save_bars, times_of

        save_bars(args.plot, times_of(finished), "Time of optimizer.step()")
        say(console, f"\nPicture: {args.plot}")
    if args.json is not None:
        say(console, f"Every sample: {args.json}")
    return status


def save(args: argparse.Namespace, records: list[Record], device: torch.device, interrupted: bool) -> None:
    """Write what is finished."""
    if args.json is not None:
        write_file(args.json, "bench", records, device, interrupted=interrupted)


def check_options(args: argparse.Namespace) -> None:
    """Find whatever would stop the command halfway.

    Raises:
        ValueError: an extra is missing, or an option has no usable value.
    """
    require(("rich", "matplotlib") if args.plot else ("rich",), "triton-optim bench", "bench")
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds} measures nothing. Give 1 or more (5 is the default).")
    if not args.patience >= 0:
        raise ValueError(f"--patience {args.patience} is no time. Give seconds, 0 or more (5 is the default).")
    check_files(args.plot, args.json)


def chosen_cases(
    args: argparse.Namespace, device: torch.device, peers: list[str], backends: list[str]
) -> Iterator[Case]:
    """The cases of all names given, each of a model that fits.

    Raises:
        ValueError: a name is unknown, with those that are known; or a user's model does not fit.
    """
    for peer in peers:
        check_peer(peer)
    options = {"state_dtype": STATES[args.state], "param_precision": args.precision}
    kinds = [optimizer_class(name) for name in args.optimizer.split(",")]
    dtypes = [ALL_DTYPES[name] for name in chosen("--dtype", args.dtype, ALL_DTYPES)]
    models = {name: own_shapes(name) if ":" in name else shapes(name) for name in args.model.split(",")}
    free = free_bytes(device)
    for (name, whole), dtype, kind in product(models.items(), dtypes, kinds):
        each = bytes_per_parameter(kind, dtype, options, len(backends), len(peers))
        limit = int(SHARE * free / each)
        kept = cut(whole, limit)
        text = ""
        if len(kept) < len(whole):
            need = (
                f"{name} of {elements(whole):,} {short(dtype)} parameters needs "
                f"{gibibytes(int(each * elements(whole)))} GiB for {len(backends) + len(peers)} sides, and "
                f"{gibibytes(int(SHARE * free))} may be used"
            )
            if ":" in name or not kept:
                fewer = SHARE * free / bytes_per_parameter(kind, dtype, options, 1, 1)
                raise ValueError(
                    f"{need}. What fits: {limit:,} parameters, or {int(fewer):,} with one peer in --against and one "
                    f"backend; of the named models {', '.join(fitting_models(limit)) or 'none'}."
                )
            text = f"cut down to {len(kept)} of its {len(whole)} tensors, {elements(kept):,} parameters: {need}"
        yield Case(kind, name, kept, dtype, device, options, cut=text)


def optimizer_class(name: str) -> type[RuleOptimizer]:
    """The class that `name` means: one of the package's, or a user's own as ``module:name``."""
    if ":" not in name:
        return rule_optimizers()[chosen("--optimizer", name.lower(), rule_optimizers())[0]]
    own: Any = load("--optimizer", name)
    if not (isinstance(own, type) and issubclass(own, RuleOptimizer)):
        raise ValueError(f"--optimizer {name} is no subclass of triton_optim.RuleOptimizer. Give it to --against.")
    return own
