"""Which backend runs a bucket of parameters: a pure function of what is asked and what the machine has."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

Backend = Literal["triton", "cpp", "compiled", "eager"]
BACKENDS: tuple[Backend, ...] = ("triton", "cpp", "compiled", "eager")
Layout = Literal["dense", "strided", "overlapping", "wrapper"]

GPUS = ("cuda", "xpu")  # torch calls ROCm devices cuda
COMPILED_DEVICES = ("cpu", "mps", *GPUS)
CPP_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


NO_SOURCES = "compiles the .py files of triton_optim, of which only .pyc files are installed"

stub_driver: Any = None  # of stub_driver.install


class Machine(NamedTuple):
    """What is installed here."""

    triton: bool
    interpreter: bool  # TRITON_INTERPRET=1: Triton kernels run on CPU tensors
    compiler: bool  # a C++ compiler, which torch.compile needs on a CPU
    cpp: bool  # whether the C++ backend can be built here
    stub: bool = False  # a stub driver is active: Triton compiles for a GPU, and launches nothing, on CPU tensors
    sources: bool = True  # the package's own .py files, which Triton and C++ are compiled from

    @property
    def triton_devices(self) -> tuple[str, ...]:
        """Where the tensors may be that Triton's kernels are launched on."""
        return (*GPUS, "cpu") if self.interpreter or self.stub else GPUS


class Request(NamedTuple):
    """What one bucket of parameters is, and what its user asks for."""

    device: str
    dtype: torch.dtype
    layout: Layout = "dense"
    differentiable: bool = False
    sparse: bool = False  # the gradients; only the elements that they hold are to be updated
    pinned: Backend | None = None  # backend=
    fused: bool | None = None
    foreach: bool | None = None


class LaunchError(RuntimeError):
    """A kernel could not be compiled, loaded or started. Nothing of it ran."""


class Choice(NamedTuple):
    backend: Backend
    reason: str


@cache
def this_machine() -> Machine:
    """What is installed on this machine. Nothing is imported or started to find out.

    Example:
        >>> import triton_optim
        >>> isinstance(triton_optim.dispatch.this_machine().triton, bool)
        True
    """
    triton = importlib.util.find_spec("triton") is not None
    sources = not __file__.endswith(".pyc")
    interpreter = triton and sources and os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")
    compiler = cxx_compiler() is not None
    cpp = compiler and sys.platform == "linux"  # elsewhere OpenMP is another library's, and takes other options
    return Machine(triton, interpreter, compiler, cpp, stub_driver is not None, sources)


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would start: ``$CXX``, else the platform's usual one; None if not found."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else []
    names += ["clang++"] if sys.platform == "darwin" else ["cl"] if sys.platform == "win32" else ["g++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def only_eager(request: Request) -> str | None:
    """Why only the eager backend can run this bucket, or None."""
    if request.differentiable:
        return "differentiable=True records the step for autograd"
    if request.sparse:
        return "the gradients are sparse: the elements that they hold are gathered, updated and scattered"
    if request.dtype.is_complex:
        return f"{request.dtype} runs as pairs of reals"
    if request.layout == "wrapper":
        return "a parameter, gradient or state is of a class whose elements only its own operations reach"
    if request.layout == "overlapping":
        return "parameters or states overlap in memory, so they are updated one after another"
    if request.layout == "strided":
        return "the parameter is a view with gaps"
    return None


def unable(backend: Backend, request: Request, machine: Machine) -> str | None:
    """Why `backend` cannot run this bucket on this machine, or None."""
    if backend == "eager":
        return None
    if reason := only_eager(request):
        return reason
    if backend == "triton":
        if not machine.triton:
            return "Triton is not installed"
        if not machine.sources:
            return f"Triton {NO_SOURCES}"
        if request.device not in machine.triton_devices:
            return f"it needs GPU tensors; these are on {request.device}"
        return None
    if backend == "cpp":
        if request.device != "cpu":
            return f"it needs CPU tensors; these are on {request.device}"
        if not machine.sources:
            return f"the C++ backend {NO_SOURCES}"
        if not machine.compiler:
            return "no C++ compiler was found"
        if not machine.cpp:
            return "it is built on Linux only"
        return None if request.dtype in CPP_DTYPES else f"C++ has no {request.dtype}"
    if request.device not in COMPILED_DEVICES:
        return f"torch.compile has no code generator for {request.device}"
    if request.device == "cpu" and not machine.compiler:
        return "no C++ compiler was found"
    if request.device in GPUS and not machine.triton:
        return "torch.compile needs Triton on a GPU, and it is not installed"
    return None


def remedy(request: Request, machine: Machine) -> str:
    """What to do where a pinned backend is unable."""
    if only_eager(request):
        return 'Use backend="eager", or leave backend out to choose automatically.'
    if not machine.sources and request.pinned != "compiled":
        return "Install them, or leave backend out to choose automatically."
    if request.pinned == "cpp" and request.device != "cpu":
        return "Move the parameters to the CPU, or leave backend out to choose automatically."
    if request.pinned == "triton":
        first = "Move the parameters to a GPU" if machine.triton else "Install it (pip install triton)"
        return f"{first}, or leave backend out to choose automatically."
    return "Install g++ or set CXX, or leave backend out to choose automatically."


@cache
def choose(request: Request, machine: Machine) -> Choice:
    """The backend for a bucket, and why.

    A pinned `backend` runs or raises; it never falls back. ``fused=True`` prefers the one-kernel backend of the device
    (Triton on a GPU, C++ on a CPU) and ``foreach=True`` the compiled one; where these cannot run, the automatic
    choice is made. One of them False and none True is eager, as torch's for-loop.

    Args:
        request: what the bucket is and what was asked for.
        machine: what is installed.

    Raises:
        RuntimeError: the pinned backend cannot run this bucket here.

    Example:
        >>> import torch
        >>> from triton_optim.dispatch import Machine, Request, choose
        >>> everything = Machine(triton=True, interpreter=False, compiler=True, cpp=True)
        >>> choose(Request("cuda", torch.float32), everything).backend
        'triton'
    """
    if request.pinned is not None:
        if reason := unable(request.pinned, request, machine):
            raise RuntimeError(
                f'backend="{request.pinned}" cannot run {request.dtype} parameters on {request.device}: {reason}. '
                f"{remedy(request, machine)}"
            )
        return Choice(request.pinned, "asked for by backend=")
    if reason := only_eager(request):
        return Choice("eager", reason)
    on_gpu = request.device in GPUS
    if request.fused or request.foreach:
        one_kernel: Backend = "triton" if on_gpu else "cpp"
        wanted = one_kernel if request.fused else "compiled"
        if unable(wanted, request, machine) is None:
            return Choice(wanted, f"asked for by {'fused' if request.fused else 'foreach'}=True")
    elif request.fused is False or request.foreach is False:
        return Choice("eager", "asked for by foreach=False or fused=False")
    if on_gpu and unable("triton", request, machine) is None:
        return Choice("triton", "one launch for all parameters on a GPU")
    if unable("cpp", request, machine) is None:
        return Choice("cpp", "one call for all parameters on a CPU")
    obstacle = unable("compiled", request, machine)
    if obstacle is None:
        return Choice("compiled", f"torch.compile is the fastest here on {request.device}")
    return Choice("eager", obstacle)


def next_best(failed: Backend, request: Request, machine: Machine) -> Backend:
    """What runs a bucket that was chosen automatically where what was chosen cannot be built.

    Example:
        >>> import torch
        >>> from triton_optim.dispatch import Machine, Request, next_best
        >>> machine = Machine(triton=True, interpreter=False, compiler=True, cpp=True)
        >>> next_best("cpp", Request("cpu", torch.float32), machine)
        'compiled'
    """
    # Of the others, each is the last that can be compiled for its device.
    return choose(request, machine._replace(cpp=False)).backend if failed == "cpp" else "eager"
