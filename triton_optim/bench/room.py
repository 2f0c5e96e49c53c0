"""What fits into memory: how many parameters all sides of a comparison can have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.memory import memory_report
from ..core.optimizer import RuleOptimizer
from .models import NAMED, Shapes, elements, shapes

SHARE = 0.8  # of what is free: compilers and other programs need some
MEMORY_LIMIT, MEMORY_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def free_bytes(device: torch.device) -> int:
    """Bytes that may be allocated on a device."""
    if device.type in ("cuda", "xpu"):
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # all of it; half is taken to be free
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(available.split()[1]) * 1024
    if MEMORY_LIMIT.exists() and (limit := MEMORY_LIMIT.read_text().strip()) != "max":
        free = min(free, int(limit) - int(MEMORY_USED.read_text()))
    return free


def bytes_per_parameter(
    optimizer: type[RuleOptimizer], dtype: torch.dtype, options: dict[str, Any], ours: int, peers: int
) -> float:
    """Bytes of all sides together, the temporaries of one of them and the copy that they are compared with.

    Peers are taken to keep what torch keeps.
    """
    parameter = torch.nn.Parameter(torch.empty(1024, 1024, dtype=dtype, device="meta"))
    report = memory_report(optimizer([parameter], **options))
    temporaries = 3 * report.weights + 4 * report.parameters
    return (ours * report.total + peers * report.torch_total + temporaries) / report.parameters


def cut(whole: Sequence[tuple[int, ...]], limit: int) -> Shapes:
    """The first tensors of a model, with at most `limit` parameters together; one that is too large is left out."""
    kept: Shapes = []
    left = limit
    for shape in whole:
        if (count := elements([shape])) <= left:
            kept.append(shape)
            left -= count
    return kept


def fitting_models(limit: int) -> list[str]:
    """The named models of at most `limit` parameters."""
    return [name for name in NAMED if elements(shapes(name)) <= limit]
