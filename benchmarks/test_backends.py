"""Which backend is the fastest for which dtype, on ResNet-50?"""

from collections.abc import Callable

import pytest
import torch

import triton_optim
from triton_optim.bench.comparison import Case, compare
from triton_optim.bench.models import shapes
from triton_optim.dispatch import BACKENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_backends(
    dtype: torch.dtype, device: torch.device, benchmark: Callable, answer: Callable, patience: float
) -> None:
    case = Case(triton_optim.AdamW, "resnet50", shapes("resnet50"), dtype, device)
    # Triton's interpreter is no way to run a step that anybody would time.
    backends = [backend for backend in BACKENDS if device.type != "cpu" or backend != "triton"]
    found = compare(case, ["torch-fused"], ["auto", *backends], patience=patience, rounds=5)
    ratios, words = found.beside(["torch-fused"]) or ({}, "")
    own = {row.side: row.ratio[0] for row in found.rows if row.side.startswith("ours,") and row.ratio}
    best = max(own.values())
    text = f"{found.text}; the automatic choice takes {best:.3f} x the best pinned one; {words}"
    figures = found.figures | ratios | {"ours over the best pinned backend": best}
    answer(case.name, text.rstrip("; "), figures, measurement=found.measurement)
    benchmark.pedantic(found.contenders[0].step, rounds=3)
