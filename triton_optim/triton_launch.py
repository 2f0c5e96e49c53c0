"""How Triton's kernels are started."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from triton.runtime import driver

from .dispatch import this_machine


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Start a kernel on the device of its first argument. The only place that does."""
    with on(arguments[0].device):
        kernel[(programs,)](*arguments, **constants)


def compile_ahead(kernel: Any, dtypes: tuple[Any, ...], constants: dict[str, Any], device: torch.device) -> None:
    """Compile a kernel without a launch, for arguments of these dtypes."""
    with on(device):
        kernel.warmup(*dtypes, grid=(1,), **constants)


def on(device: torch.device) -> Any:
    """Make a device the current one for a launch."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def warp_size(device: torch.device) -> int:
    """Threads a warp: 32 on NVIDIA and in the interpreter, 64 on AMD's data-centre GPUs."""
    if this_machine().interpreter:
        return 32
    with on(device):
        return int(driver.active.get_current_target().warp_size)
