"""A device in host memory that no operation of the CPU takes: what is on the wrong side raises, as with a GPU."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from triton_optim.util.cpp_build import library
from triton_optim.util.gather import flags

NAME = "elsewhere"


@cache
def elsewhere() -> torch.device:
    """The device, which is compiled first: once for a folder of libraries."""
    text = (Path(__file__).parent / "elsewhere.cpp").read_text()
    own = [flag for flag in flags() if flag not in ("-O2", "-lc10")]
    library(f"// torch {torch.__version__}\n{text}", (*own, "-O0", "-w", "-lc10", "-ltorch_cpu"), ctypes.CDLL)
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available, module.current_device, module.device = lambda: True, int, nullcontext
    module._lazy_init, module._is_in_bad_fork, module.manual_seed_all = bool, bool, id
    torch._register_device_module(NAME, module)
    return torch.device(NAME, 0)
