"""`triton-optim audit`: what every rule compiles to on every GPU, with no GPU here."""

from __future__ import annotations

import argparse
import platform
import sys
import textwrap
from collections.abc import Collection
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..audit.gpus import GPUS
from ..util.files import write_json
from ..util.table import table
from .options import check_files, chosen

if TYPE_CHECKING:
    from ..audit.cases import Case
    from ..audit.measure import Measurement

KEPT = "fp32,bf16 stochastic,bf16 int8"  # that are predicted by default
HEADER = ("rule", "dtypes", "arch", "regs", "spills", "loaded/floor", "stored/floor", "bits", "instr", "code")
LEGEND = """\
regs    registers a thread; on gfx942, vector registers
spills  instructions that access the stack, and registers that AMD's compiler says it spilled
loaded, stored, bits, instr
        of the branch for full chunks: bytes an element beside the fewest possible, width of the
        narrowest access, instructions an element
code    bytes of the whole kernel"""
TWO_PASSES = """\
Of these, an element can be written when sums over all others are known, which no cache holds: two passes over the
model are the fewest. The first writes a few numbers a chunk, and reads no state that is not summed. Bytes are those
of float32, an element."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    parser.add_argument("--arch", metavar="NAMES", help="architectures, such as sm_90,gfx942 (default: all)")
    parser.add_argument("--rule", metavar="NAMES", help="rules, such as adam,lion (default: all; with --predict adamw)")
    add = parser.add_argument
    add("--quick", action="store_true", help="compile less of rules that are alike, as the tests do")
    models = "with --predict: such as gpt2,1000x1k (default: %(default)s)"
    add("--predict", metavar="GPUS", help=f"how long a step would take on {','.join(GPUS)} (names, or all)")
    add("--model", default="llama3_8b", metavar="NAMES", help=models)
    add("--kept", default=KEPT, metavar="SETS", help="with --predict: sets of dtypes (default: %(default)s)")
    add("--results", type=Path, metavar="DIR", help="with --predict: what was measured (default: this checkout's)")


def run(args: argparse.Namespace) -> int:
    """Run the audit; 0 if all is well, 1 if a case misses its bounds or the audit cannot start."""
    try:
        check_options(args)
        if args.predict is not None:
            from . import audit_predict

            return audit_predict.run(args)
        cases = chosen_cases(args)
        from ..audit import bounds as audit_bounds
        from ..audit import measure

        measured = []
        for m in measure.audit(cases):
            measured.append(m)
            show_progress(len(measured), len(cases))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    found = [audit_bounds.problems(m) for m in measured]
    print(table(HEADER, [row(m) for m in measured]))
    print(f"\n{LEGEND}\n")
    if any(m.sums for m in measured):
        print(f"{TWO_PASSES}\n")
        print(*passes({m.rule for m in measured}), "", sep="\n")
    if args.json is not None:
        write_json(args.json, record(measured, found))
        print(f"Everything measured: {args.json}")
    for m, own in zip(measured, found, strict=True):
        for problem in own:
            print(f"FAILED: {m.rule}, {stored_as(m)}, {m.arch}: {problem}")
    if any(found):
        return 1
    print(f"PASSED: {len(measured)} compilations within their bounds.")
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Find what would stop the command halfway.

    Raises:
        ValueError: Triton is missing, or a folder that is written to.
    """
    if find_spec("triton") is None:
        raise ValueError(f"triton-optim audit needs triton: not installed in {sys.prefix}. pip install triton (Linux)")
    check_files(None, args.json)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the options leave.

    Raises:
        ValueError: an option names what is not there.
    """
    from ..audit import cases

    rules = chosen("--rule", args.rule, (rule.name for rule in cases.every_rule())) if args.rule is not None else None
    archs = chosen("--arch", args.arch, cases.TARGETS) if args.arch is not None else cases.TARGETS
    return [case for case in cases.every_case(rules, args.quick) if case.arch in archs]


def show_progress(done: int, of: int) -> None:
    """Keep one line of a terminal up to date; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\rcompiled {done} of {of}", end="" if done < of else "\n", file=sys.stderr, flush=True)


def stored_as(m: Measurement) -> str:
    """The dtypes, and whether addresses are misaligned, in words."""
    return m.dtypes if m.aligned else f"{m.dtypes} misaligned"


def row(m: Measurement) -> list[str]:
    """The cells of a measurement, under `HEADER`."""
    moved = (f"{m.loaded:.4g}/{m.floor_loaded:.4g}", f"{m.stored:.4g}/{m.floor_stored:.4g}")
    counts = (str(m.registers), str(m.spills), *moved, str(m.narrowest_bits))
    return [m.rule, stored_as(m), m.arch, *counts, f"{m.instructions:.1f}", str(m.code_bytes)]


def passes(rules: Collection[str]) -> list[str]:
    """How often a step of those that sum before their rule runs passes over the model, and why; a line for each rule.

    Args:
        rules: what was compiled.
    """
    from ..audit.cases import every_rule
    from ..audit.measure import floor

    known = {rule.name: rule for rule in every_rule()}
    lines = []
    for rule in known.values():
        if rule.measure in rules:
            first, once = known[rule.measure], sum(floor(rule, "fp32"))
            moved = f"2 passes, {once + sum(floor(first, 'fp32')):g} bytes for {once:g} of one"
            lines.append(f"{rule.name}: {moved}; {first.words}")
    return [textwrap.fill(line, 118, subsequent_indent="    ") for line in lines]


def record(measured: list[Measurement], found: list[list[str]]) -> dict[str, object]:
    """What ``--json`` writes."""
    import triton

    from ..audit.bounds import bound_of

    return {
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "cases": [
            {**asdict(m), "bounds": bound_of(m)._asdict(), "problems": own}
            for m, own in zip(measured, found, strict=True)
        ],
    }
