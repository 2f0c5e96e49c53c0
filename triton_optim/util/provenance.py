"""Where a number comes from: versions, machine and date."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device, distributions: Sequence[str] = ()) -> dict[str, Any]:
    """Versions, machine and date, for a number to be worth something later.

    The versions are torch's, Triton's and this package's, and those of the other `distributions` that are installed.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # which tells one build from another
            **{name: installed_version(name) for name in ("triton", "triton-optim")},
            **{name: found for name in distributions if (found := installed_version(name))},
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
        "machine": {
            "platform": platform.platform(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "device": device_name(device),
        },
    }


def installed_version(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """`platform.processor()` is empty on most Linux systems, where /proc/cpuinfo has the name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """A GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
