"""Devices: the GPU that is here, and what a user names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accelerator() -> torch.device | None:
    """The GPU or the like that torch can use; None where there is none."""
    return torch.accelerator.current_accelerator(check_available=True)


def usable_device(what: str, name: str | torch.device | None) -> torch.device:
    """The device of that name, or the GPU if there is one, else the CPU.

    Args:
        what: names it, for the message.
        name: as torch takes it.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        device = torch.device(name or accelerator() or "cpu")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts that it has CUDA
        cause = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{what} {name} cannot be used: {cause}. Leave it out to choose automatically.") from None
    return device


def moved(value: Any, device: torch.device) -> Any:
    """A value with the tensors in it on this device, those in its lists, tuples and dicts, too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(v, device) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [moved(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
