"""Does the code that Triton compiles for GPUs do what eager steps do? ``python benchmarks/ptx_matrix.py``.

Every variant of a rule is compiled in every dtype, and one of each rule in every codec and option, for an H100; smaller
sets for an A100 and a B200. A machine for PTX (`tests/ptx_machine`) executes the code on a CPU, and finds accesses that
are out of bounds, misaligned or in a race. Without contraction to fused multiply-adds every result must be the eager
one bit for bit, but for the last bits of float64 numbers that the device forms, as it does powers. With it, the error
against float64 may be twice the eager step's, and in float64 1e-12.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
os.environ["TRITON_INTERPRET"] = "0"  # read by conftest.py

import torch
from compiled_steps import (
    BF16,
    CODED_NUMELS,
    F16,
    F32,
    F64,
    KEPT,
    Training,
    differing,
    errors,
    executing,
    rounded_once,
    unfused,
)
from ptx_machine.executor import Executor
from table import CASES

from triton_optim.bench.records import Record, with_others, write_file

QUESTION = "ptx_matrix"
PLAIN: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, {}),
    "bf16": (BF16, {}),
    "fp16": (F16, {}),
    "fp64": (F64, {}),
}
OPTIONS = {
    "fp32, capturable": (F32, {"capturable": True}),
    "bf16 stochastic, capturable": (BF16, {"capturable": True, "param_precision": "stochastic"}),
    "fp32, misaligned": (F32, {}),
    "bf16, misaligned": (BF16, {}),
    "fp32, clipped": (F32, {"max_grad_norm": 1.0}),
    "bf16 split32, clipped and averaged": (
        BF16,
        {"max_grad_norm": 1.0, "ema_decay": 0.9, "param_precision": "split32"},
    ),
}
ALL = PLAIN | KEPT | OPTIONS
RULES = [case for case in CASES if case.elementwise and not case.sparse]


class Step(NamedTuple):
    """What is compiled and executed."""

    target: str
    kept: str
    name: str
    training: Training
    fused: bool


def steps(target: str) -> Iterator[Step]:
    """For sm_90 all, for other targets a variant of each rule in two dtypes, and every codec of AdamW."""
    for case in RULES:
        for variant, options in case.variants.items():
            last = variant == list(case.variants)[-1]
            for kept in ALL if last else PLAIN:
                few = last and (kept in ("fp32", "bf16") or (case.name == "AdamW" and kept in KEPT))
                if target != "sm_90" and not few:
                    continue
                dtype, more = ALL[kept]
                numels = (1, 7, 1024, 1027) if kept in PLAIN else CODED_NUMELS
                # RAdam divides by a root from its sixth step on.
                count = 6 if case.name == "RAdam" and kept in ("fp32", "bf16") else 2
                offset = 1 if kept.endswith("misaligned") else 0
                training = Training(case.ours, options | more, dtype, numels, count, offset)
                # A norm is added up in another order than eagerly, so that bits differ.
                for fused in (True,) if "clipped" in kept else (False, True) if last and kept in PLAIN else (False,):
                    yield Step(target, kept, f"{case.name}, {variant}", training, fused)


@dataclass
class Found:
    """What came of the steps of a target that are kept in one way."""

    names: list[str] = field(default_factory=list)
    elements: int = 0
    differing: dict[str, int] = field(default_factory=dict)  # by step
    ratios: dict[str, float] = field(default_factory=dict)  # error over the eager step's, by step
    faults: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # by the optimizer, before it has taken a step
    launches: int = 0

    def record(self, target: str, kept: str) -> Record:
        bad = sum(self.differing.values()) + sum(map(len, self.faults.values()))
        bad += sum(ratio > 2 for ratio in self.ratios.values())
        text = f"{len(self.names)} steps: {sum(self.differing.values())} of {self.elements} elements differ"
        if self.ratios:
            text += f"; fused or clipped, the error is at most {max(self.ratios.values()):.3g} x the eager one"
        text += f"; {sum(map(len, self.faults.values()))} faults"
        text += f"; refused: {', '.join(self.refused)}" if self.refused else ""
        return Record(QUESTION, f"{target}, {kept}", text, self.__dict__.copy(), bad, 0)


def take(step: Step, machine: Executor, found: Found) -> None:
    """Execute a step and compare it."""
    name = f"{step.name}{', fused' if step.fused else ''}"
    training = step.training
    eagerly = training._replace(options={k: v for k, v in training.options.items() if k != "capturable"})
    try:
        theirs = eagerly.eagerly()
    except RuntimeError as error:  # RMSprop keeps no rounded states where it is centered
        found.refused[name] = str(error)
        return
    machine.launches.clear()
    with nullcontext() if step.fused else unfused():
        ours = training.run("triton")
    found.names.append(name)
    found.launches += len(machine.launches)
    if faults := machine.take_faults():
        found.faults[name] = list(map(str, faults))
    if step.fused:
        exact = eagerly.exactly()
        eager_error = errors(theirs, exact)
        ratios = [e / eager_error[role] for role, e in errors(ours, exact).items() if e > 1e-12]
        found.ratios[name] = max(ratios, default=0.0)
    else:
        found.elements += sum(x.numel() for x in ours.values())
        formed = {n: theirs[n] if in_last_bits(x, theirs[n]) else x for n, x in ours.items()}
        if different := sum(differing(formed, theirs).values()):
            found.differing[name] = different


def in_last_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether these are float64 numbers, of a parameter or group, that differ in their last two bits at most."""
    return x.dim() == 0 and x.dtype == F64 and torch.allclose(x, y, rtol=4 * torch.finfo(F64).eps, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="a folder for ptx_matrix.json")
    parser.add_argument("--rows", default="", help="rows whose names hold this; of a file the others stay")
    args = parser.parse_args()
    started = time.monotonic()
    records = []
    for target in ("sm_90", "sm_80", "sm_100"):
        found: dict[str, Found] = defaultdict(Found)
        with executing(target) as machine, rounded_once():
            for step in steps(target):
                if args.rows in f"{step.target}, {step.kept}":
                    take(step, machine, found[step.kept])
        for kept, own in found.items():
            records.append(own.record(target, kept))
            print(records[-1].line(), flush=True)
        if args.results is not None:
            path = args.results / f"{QUESTION}.json"
            all_records, earlier = with_others(path, records) if args.rows else (records, {})
            write_file(path, QUESTION, all_records, torch.device("cpu"), **earlier)
    print(f"{sum(len(r.figures['names']) for r in records)} steps in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
