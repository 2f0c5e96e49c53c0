"""A device in host memory that no operation of the CPU takes: what is on the wrong side raises, as with a GPU."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

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
    return torch.device(NAME, 0)
