"""Benchmarks rehearsed without a GPU: Triton launches CPU tensors into a stub driver; everything is small and short.

What is measured then means nothing, and nothing is compared; what is tested is that the benchmarks run. conftest
imports it before any benchmark takes from the modules what is replaced here.
"""

from typing import Any

import torch

from triton_optim.backends.triton import stub_driver
from triton_optim.bench import agreement, measure, models


def begin() -> None:
    """For the rest of this process."""
    timed = measure.measure

    def once(*sides: Any, **how: Any) -> measure.Measurement:
        return timed(*sides, **how | {"rounds": 1})

    stub_driver.install("sm_90")
    agreement.differences = lambda contenders, seed=1: {}
    measure.measure, measure.ROUND_SECONDS, measure.WAIT_SECONDS = once, 0.0, 0.0
    models.shapes = lambda name: [(64, 48), (48,)] * 4
    torch.accelerator.synchronize = torch.accelerator.empty_cache = lambda *_: None
