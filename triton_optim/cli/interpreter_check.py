"""A few steps of the real Triton kernels in Triton's interpreter, beside torch.optim.AdamW, on the CPU.

`python -m triton_optim.cli.interpreter_check` prints one JSON object. It is a process of its own because
Triton reads TRITON_INTERPRET once, when it is imported; `run_interpreter_check` starts it so.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import triton_optim

from .own_process import run_module

SHAPES = ((), (1,), (7,), (33, 5), (128,), (3, 3, 3, 3), (1023,), (1025,), (0,))
STEPS = 4
LIMIT = 1e-6  # four units in the last place of an fp32 parameter between 2 and 4
TIMEOUT_SECONDS = 120.0


def largest_differences() -> dict[str, float]:
    """Returns the largest absolute difference from torch of the parameters and of each state, after STEPS.

    Parameters and gradients are standard normal, lr is 0.01, so the parameters move by about 0.04. There are
    two groups, and one parameter misses one gradient, so that step counts differ within the launch.
    """
    torch.manual_seed(0)
    start = [torch.randn(shape, device="cpu") for shape in SHAPES]
    theirs = [p.clone().requires_grad_() for p in start]
    ours = [p.clone().requires_grad_() for p in start]
    reference = torch.optim.AdamW(groups(theirs), lr=1e-2)
    optimizer = triton_optim.AdamW(groups(ours), lr=1e-2, backend="triton")
    for step in range(STEPS):
        for index, (p, q) in enumerate(zip(theirs, ours, strict=True)):
            missing = step == 1 and index == 2
            p.grad = None if missing else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        reference.step()
        optimizer.step()
    differences = {"parameters": largest_difference(theirs, ours)}
    for name in ("exp_avg", "exp_avg_sq"):
        differences[name] = largest_difference(
            [reference.state[p][name] for p in theirs], [optimizer.state[q][name] for q in ours]
        )
    return differences


def groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
    """The parameter groups of a case."""
    return [
        {"params": parameters[::2], "weight_decay": 0.1},
        {"params": parameters[1::2], "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest absolute difference over all elements; NaN if either side has one."""
    differences = torch.cat([(p.detach() - q.detach()).abs().flatten() for p, q in zip(left, right, strict=True)])
    return float(differences.max())


def run_interpreter_check(timeout: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """Runs this module in a process of its own and returns what it measured.

    The keys are "largest_difference", "differences", "limit", "steps", "tensors", "elements" and "seconds".

    Raises:
        ProcessError: the process failed, or was still running after `timeout` seconds.
        ModuleNotFoundError: Triton is not installed, so that there is nothing to check.
    """
    if find_spec("triton") is None:
        raise ModuleNotFoundError(
            f"Triton is not installed in {sys.prefix}, so its kernels were not run in the interpreter "
            f'either. On Linux: pip install "triton"'
        )
    return run_module("The interpreter check", "interpreter_check", [], {"TRITON_INTERPRET": "1"}, timeout)[-1]


def main() -> int:
    """Check the kernels, and say what came of it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("TRITON_INTERPRET is not 1, so Triton would compile for a GPU. Set it to 1.", file=sys.stderr)
        return 2
    start = time.perf_counter()
    differences = largest_differences()
    measured = {
        "largest_difference": max(differences.values()),
        "differences": differences,
        "limit": LIMIT,
        "steps": STEPS,
        "tensors": len(SHAPES),
        "elements": sum(torch.Size(shape).numel() for shape in SHAPES),
        "seconds": time.perf_counter() - start,
    }
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
