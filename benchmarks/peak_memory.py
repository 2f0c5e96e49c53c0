"""What an optimizer keeps, and what a step takes while it runs, as torch's allocators saw it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer


@dataclass(frozen=True)
class Memory:
    """Bytes a parameter, beside parameters and gradients.

    Attributes:
        kept: after the first step: states, corrections, tables and packed copies.
        first_step: the most that the first step took at once, what it keeps included.
        temporary: the most that a later step took at once beyond what is kept.
    """

    kept: float
    first_step: float
    temporary: float


def memory_of(make: Callable[[], Optimizer], device: torch.device) -> Memory:
    """Measure an optimizer and its steps.

    A first one is made and thrown away: what compilers allocate once for a process is not counted.

    Args:
        make: returns the optimizer, whose parameters have gradients.
        device: where they are.
    """
    warm = make()
    warm.step()
    warm.step()
    del warm
    optimizer = make()
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    peak = peak_on_cpu if device.type == "cpu" else peak_on_gpu
    gc.collect()
    first, kept = peak(optimizer.step, device)
    optimizer.step()
    later, left = peak(optimizer.step, device)
    return Memory(kept / count, first / count, (later - left) / count)


def peak_on_gpu(run: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """The most bytes that `run` had at once beyond those before it, and what it left."""
    module = torch.get_device_module(device)
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    run()
    gc.collect()
    module.synchronize(device)
    return module.max_memory_allocated(device) - before, module.memory_allocated(device) - before


def peak_on_cpu(run: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """As `peak_on_gpu`, from the profiler's record of every allocation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
        gc.collect()
    result = profile.profiler.kineto_results if profile.profiler is not None else None
    assert result is not None
    changes = [(e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]"]
    now = most = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        now += nbytes
        most = max(most, now)
    return most, now
