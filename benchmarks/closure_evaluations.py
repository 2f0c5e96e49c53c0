"""How many evaluations do the closure-driven optimizers need on problems in any units, beside scipy's?

    python benchmarks/closure_evaluations.py --processes 2 --results benchmarks/results
    python benchmarks/closure_evaluations.py --problems Wood Beale --copies 4

Each problem f is minimized as s f(x / c), with s and c from 1e-12 to 1e12: a hundred copies. A copy is solved when the
loss is nearer to the least than 1e-10 of what there is to gain, 1e-6 in float32; then, and at the end, evaluations of
loss and gradient are counted. No more than 1,000 are allowed. Nothing is timed.

Ours is NonlinearCG as it comes. Scipy's has on copies its tolerances in their units: ours of the gradient, and none of
the loss. Its first step has length 1 whatever the units: where c is 1e-12 that is 1e12 of f's, which overflows float32,
and where c is 1e12 float32 rounds it away. How often scipy solves says as much of the units as of scipy. So the problem
as it stands in books, in units of 1, is counted too, in brackets; there also with scipy's own, absolute tolerances.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from scaled_problems import Outcome, Scaled, problems

from triton_optim import LBFGS
from triton_optim.bench.records import Record, write_file

QUESTION = "closure_evaluations"
BUDGET = 1000
RATIO = 1.25  # of our evaluations to those of scipy's conjugate gradients, where both solve
OURS, CG, LBFGSB = "NonlinearCG", "scipy CG, relative tolerance", "scipy L-BFGS-B, relative tolerance"
ON_COPIES = (OURS, CG, LBFGSB)
METHODS: dict[str, Callable[[Scaled], Outcome]] = {
    OURS: lambda copy: copy.by_ours(),
    CG: lambda copy: copy.by_scipy("CG", gtol=1e-8 * copy.largest_gradient()),
    "scipy CG": lambda copy: copy.by_scipy("CG"),
    LBFGSB: lambda copy: copy.by_scipy("L-BFGS-B", gtol=1e-8 * copy.largest_gradient(), ftol=0.0),
    "scipy L-BFGS-B": lambda copy: copy.by_scipy("L-BFGS-B"),
    "LBFGS, strong Wolfe": lambda copy: copy.by_ours(LBFGS, line_search_fn="strong_wolfe"),
}


def units(copies: int) -> list[tuple[float, float]]:
    """Pairs of s and c, in a square of so many a side as make at least `copies`."""
    side = math.ceil(math.sqrt(copies))
    scales = [10 ** (-12 + 24 * i / max(1, side - 1)) for i in range(side)]
    return list(product(scales, scales))[:copies]


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    solved = [outcome.solved for outcome in outcomes if outcome.solved < math.inf]
    return {
        "solved": len(solved),
        "median evaluations until solved": median(solved) if solved else None,
        "median evaluations": median(outcome.calls for outcome in outcomes),
        "until solved": " ".join(f"{outcome.solved:g}" for outcome in outcomes),
        "evaluations": " ".join(str(outcome.calls) for outcome in outcomes),
        "final loss above the least": " ".join(f"{outcome.gap:.2g}" for outcome in outcomes),
    }


def record_of(name: str, dtype: torch.dtype, copies: int) -> Record:
    """Every method on every copy of a problem, and on the problem in units of 1."""
    torch.set_num_threads(1)
    problem = next(problem for problem in problems() if problem.name == name)
    pairs = units(copies)
    as_it_is = {name: run(Scaled(problem, 1.0, 1.0, dtype, BUDGET)) for name, run in METHODS.items()}
    outcomes = {
        name: [run(Scaled(problem, s, c, dtype, BUDGET)) for s, c in pairs]
        for name, run in METHODS.items()
        if name in ON_COPIES
    }
    figures: dict[str, Any] = {name: summary(found) for name, found in outcomes.items()}
    both = [
        ours.solved / theirs.solved
        for ours, theirs in zip(outcomes[OURS], outcomes[CG], strict=True)
        if max(ours.solved, theirs.solved) < math.inf
    ]
    texts = []
    for name in ON_COPIES:
        entry = figures[name]
        count = entry["median evaluations until solved"]
        own = f"{as_it_is[name].solved:g}" if as_it_is[name].solved < math.inf else "not solved"
        texts.append(f"{name} {entry['solved']} of {len(pairs)}" + (f" in {count:g}" if count else "") + f" ({own})")
    figures["in units of 1"] = {
        name: found._asdict() | {"solved": found.solved if found.solved < math.inf else None}
        for name, found in as_it_is.items()
    }
    figures["units s, c"] = [f"{s:.3g}, {c:.3g}" for s, c in pairs]
    case = f"{problem.name}, {str(dtype).removeprefix('torch.')}"
    value = median(both) if both else None
    figures["copies that both solve"] = len(both)
    return Record(QUESTION, case, "; ".join(texts), figures, value, RATIO if both else None)


def records(names: list[str], copies: int, processes: int) -> Iterator[Record]:
    cases = list(product((torch.float64, torch.float32), names))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(record_of, [n for _, n in cases], [d for d, _ in cases], [copies] * len(cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [problem.name for problem in problems()]
    parser.add_argument("--problems", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--copies", type=int, default=100, help="of each problem (default 100)")
    parser.add_argument("--results", type=Path, help=f"folder for {QUESTION}.json; nothing is written without it")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    found: list[Record] = []
    for record in records(options.problems, options.copies, options.processes):
        print(record.line(), flush=True)
        found.append(record)
        if options.results:
            options.results.mkdir(parents=True, exist_ok=True)
            write_file(
                options.results / f"{QUESTION}.json", QUESTION, found, torch.device("cpu"), scipy=version("scipy")
            )


if __name__ == "__main__":
    main()
