"""``triton-optim memory``: what a model of a size would keep in memory, with which optimizer and options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.memory import memory_report, meta_parameter
from ..core.optimizer import RuleOptimizer
from ..precision.codecs import PARAM_PRECISIONS, STATE_CODES
from ..registry import rule_optimizers
from ..util.extras import require
from ..util.pictures import new_figure, stacked_bars
from .options import check_files, chosen

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNIT = "bytes a parameter"
STATES = {"none": None, "float32": torch.float32, "bfloat16": torch.bfloat16, **{code: code for code in STATE_CODES}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--params", type=count, required=True, metavar="N", help="parameters, such as 7e9 or 7B")
    add("--optimizer", type=str.lower, default="adamw", help="such as adamw (default)", metavar="NAME")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the parameters (default: bfloat16)")
    add("--state", choices=STATES, default="none", help="state_dtype (default: none, the parameters')")
    add("--precision", choices=PARAM_PRECISIONS, default="storage", help="param_precision (default: storage)")
    add("--plot", type=Path, metavar="FILE", help="draw every state_dtype beside torch's to FILE: .png, .svg or .pdf")
    add("--offload", action="store_true", help='the states in host memory (offload="cpu")')


def count(text: str) -> float:
    """The number of parameters in the name of a model, such as 7B, or in digits."""
    factor = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        return float(text) if factor is None else factor * float(text[:-1])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number. Give one such as 7e9, 7B or 350M.") from None


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for what would stop the command halfway."""
    if not 0 < args.params < 1e15:
        raise ValueError(f"--params {args.params:g}: a model has at least one and fewer than 1e15. Try 7e9.")
    if args.precision != "storage" and args.dtype == "float32":
        raise ValueError(
            f"--precision {args.precision} is for parameters of 16 bits, and float32 ones stay as they are. Give "
            "--dtype bfloat16, or leave it out."
        )
    if args.plot is not None:
        require(["matplotlib"], "triton-optim memory --plot", "demo")
        check_files(args.plot, None)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    known = rule_optimizers()
    options = {"state_dtype": STATES[args.state], "param_precision": args.precision}
    options |= {"offload": "cpu"} if args.offload else {}
    try:
        check_options(args)
        (name,) = chosen("--optimizer", args.optimizer, known)
        parameter = meta_parameter(int(args.params), DTYPES[args.dtype])
        report = memory_report(optimizer := known[name]([parameter], **options))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    asked = f"state_dtype={args.state}, param_precision={args.precision}" + ', offload="cpu"' * args.offload
    print(f"{type(optimizer).__name__} of {parameter.numel():,} {args.dtype} parameters, {asked}")
    print(report)
    if args.plot is not None:
        what = f"{args.params:,.0f} {args.dtype} parameters, param_precision={args.precision}"
        build: Any = partial(known[name], [parameter], param_precision=args.precision)
        save_plot(args.plot, bars(build), f"{type(optimizer).__name__}, {what}")
        print(f"Picture: {args.plot}")
    return 0


def save_plot(path: Path, bars: dict[str, dict[str, float]], title: str) -> None:
    """Draw what is kept in memory."""
    figure = new_figure(8, 3.2, dpi=150)
    axes = figure.subplots()
    stacked_bars(axes, bars, UNIT)
    axes.set_title(title, fontsize="medium")
    figure.savefig(path)


def bars(build: Callable[..., RuleOptimizer]) -> dict[str, dict[str, float]]:
    """Bytes a parameter by part: with torch's optimizer, and with every ``state_dtype``.

    Args:
        build: makes the optimizer, of a ``state_dtype``; where it raises, no bar is drawn.
    """
    found: dict[str, dict[str, float]] = {}
    for name, state in STATES.items():
        try:
            report = memory_report(build(state_dtype=state))
        except (RuntimeError, ValueError):
            continue
        found.setdefault("torch.optim", report.parts(torchs=True))
        own = report.parts()
        if own not in found.values() or name == "none":
            found["as it comes" if name == "none" else f"state_dtype={name}"] = own
    return found
