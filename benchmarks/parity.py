"""Is every step on this GPU as exact in Triton as eagerly?

    python benchmarks/parity.py --json parity.json
    python benchmarks/parity.py --rehearse --cases "AdamW, default|int8"

Every optimizer and its variants, every codec and option of tests/steps.py: a few steps in Triton, eagerly, and eagerly
in float64, from the same parameters with the same gradients. A side's error is the root mean square of its weights'
differences from float64's, over that of the update; Triton's may be at most twice eager's, and half of the update, of
which a side that moved nothing is off by all. The file is written after each case.

With --rehearse there is no GPU: Triton launches into a stub driver, nothing is computed, and a case passes if its
launches happen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

REHEARSES = "--rehearse" in sys.argv
if REHEARSES:
    os.environ["TRITON_INTERPRET"] = "0"  # the tests' conftest would switch it on
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch  # noqa: E402
from steps import Step, every_step  # noqa: E402
from torch import Tensor  # noqa: E402

from triton_optim import RuleOptimizer  # noqa: E402
from triton_optim.backends.triton import stub_driver  # noqa: E402
from triton_optim.core.convert import master  # noqa: E402
from triton_optim.util.provenance import provenance  # noqa: E402

STEPS = 5  # so many take RAdam into its second phase at betas of 0.8 and 0.95, and every state into use
FACTOR, MOST = 2.0, 0.5
LR = {"lr": 0.1}  # where a case has none of its own: updates well above what bfloat16 rounds away
SHAPES = ((160, 160), (1031,), (7,), (64, 64))
STORAGE = ("param_precision", "state_dtype", "ema_dtype")  # options that say how values are kept


def errors(step: Step, device: torch.device) -> dict[str, float]:
    """Triton's and eager's error, and what is allowed. In rehearsal Triton's says nothing."""
    step = step._replace(options=LR | step.options)
    options = {name: value for name, value in step.options.items() if name not in STORAGE}
    wide = step._replace(dtype=torch.float64, options=options)
    torch.manual_seed(0)
    sides = [
        step.optimizer("triton", device, SHAPES),
        step.optimizer("eager", device, SHAPES),
        wide.optimizer("eager", device, SHAPES),
    ]
    first, *others = [params(side) for side in sides]
    with torch.no_grad():
        for other in others:
            for p, q in zip(first, other, strict=True):
                q.copy_(p)
    start = [p.detach().double().clone() for p in first]
    for _ in range(STEPS):
        step.give_gradients(sides[0])
        for other in others:
            for p, q in zip(first, other, strict=True):
                assert p.grad is not None
                q.grad = p.grad.to(q.dtype, copy=True)
        for side in sides:
            side.step()
    averages = [False, True] if "ema_decay" in step.options else [False]
    triton, eager, allowed = 0.0, 0.0, math.inf
    for average in averages:
        ours, theirs, exact = (weights(side, average) for side in sides)
        update = root_mean_square([r - s for r, s in zip(exact, start, strict=True)])
        found, beside = (
            root_mean_square([q - r for q, r in zip(side, exact, strict=True)]) / update for side in (ours, theirs)
        )
        # In float64 eager is the reference itself: a few roundings of the parameters are allowed.
        few = 16 * torch.finfo(torch.float64).eps * root_mean_square(exact) / update
        limit = min(FACTOR * beside, MOST) + few
        if not found / limit <= triton / allowed:
            triton, eager, allowed = found, beside, limit
    return {"triton": triton, "eager": eager, "allowed": allowed}


def params(optimizer: RuleOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def weights(optimizer: RuleOptimizer, average: bool) -> list[Tensor]:
    """As exactly as they are kept, or their averages."""
    with optimizer.averaged_parameters() if average else nullcontext():
        return [(p.detach() if average else master(p, optimizer)).double().clone() for p in params(optimizer)]


def root_mean_square(tensors: Sequence[Tensor]) -> float:
    return torch.cat([t.flatten() for t in tensors]).square().mean().sqrt().item()


def judged(step: Step, device: torch.device, launches: Callable[[], int]) -> dict[str, Any]:
    """What came of a case: its errors, launches, time, whether it passed, and why not."""
    before, started = launches(), time.perf_counter()
    try:
        found: dict[str, Any] = errors(step, device)
    except Exception as error:  # one case that fails must not end the others
        found = {"passed": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    else:
        if REHEARSES:
            found = {"launches": launches() - before}
            found["passed"] = found["launches"] >= STEPS
        else:
            found["passed"] = found["triton"] <= found["allowed"]  # NaN is not
    return found | {"seconds": time.perf_counter() - started}


def write(path: Path, found: dict[str, dict[str, Any]], whole: int, device: torch.device) -> None:
    """A line for each case. The file is replaced, never half written."""
    about = {"rehearsal": REHEARSES, "cases": whole, "failed": [c for c in found if not found[c]["passed"]]}
    head = json.dumps(provenance(device) | about, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(case)}: {json.dumps(found[case])}" for case in found)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(f'{head},\n "found": {{\n{lines}\n }}\n}}\n')
    unfinished.replace(path)


def main() -> int:
    """Run the cases. The exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that gets a line for each case")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only those whose name it is found in")
    parser.add_argument("--rehearse", action="store_true", help="on CPU tensors, into a stub driver")
    args = parser.parse_args()
    launched: list[str] = []
    if REHEARSES:
        stub_driver.install("sm_90", lambda launch: launched.append(launch.name))
    elif not torch.accelerator.is_available():
        parser.error("torch sees no GPU here. Run it with --rehearse, or on a machine with one.")
    device = torch.device("cpu") if REHEARSES else torch.accelerator.current_accelerator()
    steps = {name: step for name, step in every_step().items() if re.search(args.cases, name)}
    found: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        found[name] = judged(step, device, lambda: len(launched))
        print(f"{'passed' if found[name]['passed'] else 'FAILED'}  {name}: {found[name]}", flush=True)
        if args.json:
            write(args.json, found, len(steps), device)
    failed = sum(not case["passed"] for case in found.values())
    print(f"{len(found)} cases, {failed} failed")
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
