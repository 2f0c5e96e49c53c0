"""`triton-optim audit --predict`: how long a step would take on GPUs that are not here."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import triton

from ..audit.cases import DTYPES, every_rule
from ..audit.gpu_model import CACHE_LATENCY, LAUNCH, MEMORY_LATENCY, TABLE_READS
from ..audit.gpus import GPUS
from ..audit.predict import Prediction, measured_steps, predictions, what_fits
from ..bench.models import shapes
from ..core.memory import gibibytes
from ..util.files import write_json
from ..util.table import table
from .options import chosen

RULES = "adamw"  # by default
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of the checkout that this package lies in
HEADER = ("gpu", "model", "rule", "kept as", "peak", "memory", "issue", "latency", "ends", "step", "limit", "measured")
LEGEND = """\
peak     ms in which the bytes go at the datasheet's bandwidth
memory   ms in which they go at the share of it that a copy reaches
issue    ms in which all schedulers issue the instructions of the full-chunk branch
latency  ms that programs take, as many at once as registers and threads allow (Little's law)
ends     ms until launches start, and until their last programs have ended
step     the longest of memory, issue and latency, and the ends; limit is the largest of the four"""
ASSUMED = f"""\
Assumed: {1e6 * MEMORY_LATENCY:g} us for a load from busy memory, {1e6 * CACHE_LATENCY:g} us from a cache, of which
{TABLE_READS} wait for each other before a program asks for elements; {1e6 * LAUNCH:g} us from one launch to the next;
boost clocks, and other figures of datasheets as third parties list them; nothing found in a cache; a norm by its bytes
alone. Left out: units narrower than the issue rate (roots, divisions, float64), and the host's time. Where memory is
the limit, expect it to be as good as the assumed share of bandwidth, and elsewhere too short. No GPU has confirmed it
yet."""


def run(args: argparse.Namespace) -> int:
    """Print a row for each GPU, model, rule and set of dtypes.

    Raises:
        ValueError: an option names what is not there, or there is nothing to compile with.
    """
    if args.arch is not None:
        raise ValueError(f"--arch {args.arch} says nothing to --predict: a GPU has its own. Leave it out.")
    if args.results is not None and not args.results.is_dir():
        raise ValueError(f"--results {args.results}: there is no such folder. Leave it out for this checkout's.")
    gpus = list(GPUS) if args.predict == "all" else chosen("--predict", args.predict, GPUS)
    rules = chosen("--rule", args.rule or RULES, (rule.name for rule in every_rule() if not rule.sums))
    kept = chosen("--kept", args.kept, DTYPES)
    models = [name.strip() for name in args.model.split(",")]
    for name in models:
        shapes(name)
    found = list(predictions(gpus, models, rules, kept, measured_steps(args.results or RESULTS)))
    print(table(HEADER, [row(p) for p in found]))
    print(f"\n{LEGEND}\n\n{wrapped(ASSUMED)}")
    for gpu in gpus:
        g = GPUS[gpu]
        figures = f"{g.bandwidth / 1e12:g} TB/s, of which {g.share:.0%}; {g.units} units, {g.clock / 1e9:g} GHz"
        print(wrapped(f"{gpu}: {figures} ({g.source})"))
    print()
    print(table(DETAILS, [details(p) for p in found]))
    for p in found:
        for line in remarks(p):
            print(wrapped(line))
    if args.json is not None:
        write_json(args.json, record(found))
        print(f"Everything predicted: {args.json}")
    return 0


def wrapped(text: str) -> str:
    """In lines of a terminal."""
    return textwrap.fill(text, 118, subsequent_indent="    ", break_on_hyphens=False)


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def row(p: Prediction) -> list[str]:
    """The cells of a prediction, under `HEADER`."""
    e = p.estimate
    times = (e.at_peak, e.memory, e.issue, e.latency, e.ends, e.total)
    took = ", ".join(f"{m.ms:.3g}" for m in p.measured) or "-"
    return [p.gpu, p.model, p.rule, p.dtypes, *map(milliseconds, times), e.limit, took]


DETAILS = ("gpu", "rule", "kept as", "model", "launches", "programs", "waves", "tail", "warps", "in flight", "needed")


def details(p: Prediction) -> list[str]:
    """The cells of a prediction, under `DETAILS`."""
    e = p.estimate
    flight = (f"{e.in_flight / 1024:.1f} KiB", f"{e.needed / 1024:.1f} KiB")
    counts = (str(e.launches), str(e.programs), f"{e.waves:.2f}", f"{e.tail:.0%}", f"{e.warps}/{e.most_warps}")
    return [p.gpu, p.rule, p.dtypes, p.model, *counts, *flight]


def remarks(p: Prediction) -> list[str]:
    """What else is to be said: where it does not fit, and where it was measured."""
    what = f"{p.rule}, {p.dtypes}, {p.model}"
    lines = [f"{what}: measured on {m.device}: {m.ms:g} ms, {m.date}, {m.file}" for m in p.measured]
    if p.kept_bytes > p.memory:
        rule = next(rule for rule in every_rule() if rule.name == p.rule)
        fits = what_fits(rule, [prod(shape) for shape in shapes(p.model)], p.memory)
        lines.append(
            f"{what} does not fit: parameters, gradients and states take {gibibytes(int(p.kept_bytes))} GiB, and "
            f"{p.gpu} has {gibibytes(int(p.memory))}. What would: {', '.join(fits) or 'no other set; shard it'}."
        )
    return lines


def record(found: list[Prediction]) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "versions": {"triton": triton.__version__},
        "assumptions": {"memory latency": MEMORY_LATENCY, "cache latency": CACHE_LATENCY, "launch": LAUNCH},
        "gpus": {name: gpu._asdict() for name, gpu in GPUS.items() if name in {p.gpu for p in found}},
        "predictions": [
            asdict(p)
            | {
                "estimate": p.estimate._asdict() | {"total": p.estimate.total, "limit": p.estimate.limit},
                "measured": [m._asdict() for m in p.measured],
            }
            for p in found
        ],
    }
