"""How Triton's kernels are compiled, loaded and started."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler.errors import CompilationError
from triton.runtime import driver

from ...dispatch import LaunchError, this_machine
from . import compile_ahead

_NUMBERS = {int, float, tuple}
_RUNTIME = knobs.runtime


class Launcher:
    """Starts one kernel, compiled for fixed constants, on one device.

    Triton binds, specializes and compiles once, in :meth:`load`. Its own ``kernel[grid](...)`` would do all but the
    compiling again in every launch, which takes several times as long as the launch itself. That is right as long as
    the arguments differ in value only: tables are aligned to 16 bytes, and of the int arguments none is specialized.

    Args:
        kernel: a ``@triton.jit`` function.
        types: of each argument that is not a constant: a torch dtype for a table, a value like those to come otherwise.
        constants: the constexpr arguments, and the options of the launch.
        device: of the tables.
    """

    def __init__(self, kernel: Any, types: tuple[Any, ...], constants: dict[str, Any], device: torch.device) -> None:
        self.kernel, self.types, self.constants, self.device = kernel, types, constants, device
        self._interpreted = this_machine().interpreter
        self._compiled: Any = None
        self._run: Any = None

    def compile(self) -> Any:
        """Triton's compiled kernel. Nothing is loaded.

        Raises:
            LaunchError: it does not compile.
        """
        if self._compiled is None and not self._interpreted:
            compile_ahead.wait()
            try:
                with on(self.device):
                    self._compiled = self.kernel.warmup(*self.types, grid=(1,), **self.constants)
            except Exception as error:
                raise self._failed("compiled", error) from error
        return self._compiled

    def load(self) -> None:
        """Compile the kernel and bring it to the device.

        Raises:
            LaunchError: it does not compile, or the device does not take it.
        """
        compiled = self.compile()
        if compiled is None:
            return
        try:
            with on(self.device):
                compiled._init_handles()  # `run` would load it, too, but not again after that has failed
                self._index = driver.active.get_current_device()
        except Exception as error:
            raise self._failed("loaded", error) from error
        names = self.kernel.arg_names[len(self.types) :]
        self._function, self._packed = compiled.function, compiled.packed_metadata
        self._trailing = tuple(self.constants[name] for name in names)
        self._run = compiled.run

    def fixed(self, *arguments: Any) -> tuple[Any, ...]:
        """Arguments for every call to come, with the addresses of tensors that outlive this in place of them."""
        if self._interpreted:
            return arguments
        return tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Start it on the current stream of its device.

        Args:
            programs: how many.
            arguments: those that are not constants: tables as tensors or as :meth:`fixed` made them, numbers, tuples of
                numbers.

        Raises:
            LaunchError: it could not be started.
        """
        if self._interpreted:
            self.kernel[(programs,)](*arguments, **self.constants)
            return
        if self._run is None:
            self.load()
        active, index = driver.active, self._index
        if active.get_current_device() != index:
            if self.device.type == "cpu":  # another stub driver
                self._compiled = self._run = None
            with on(self.device):
                self(programs, *arguments)
            return
        # An address is taken as it is. Of a tensor the launcher would ask for it, and then the driver where it lies.
        given = [a if type(a) in _NUMBERS else a.data_ptr() for a in arguments]
        enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
        try:
            stream = active.get_current_stream(index)
            if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
                self._compiled[programs, 1, 1](*given, *self._trailing, stream=stream)
            else:
                run, function, packed = self._run, self._function, self._packed
                run(programs, 1, 1, stream, function, packed, None, None, None, *given, *self._trailing)
        except Exception as error:
            raise self._failed("started", error) from error

    def _failed(self, what: str, error: Exception) -> LaunchError:
        while isinstance(error.__cause__, CompilationError):  # in a function that another one calls
            error = error.__cause__
        name = getattr(self.kernel, "__name__", str(self.kernel))
        # Triton prints the code before its own words.
        lines = (getattr(error, "error_message", None) or str(error)).strip().splitlines() or [""]
        return LaunchError(
            f"the Triton kernel {name} could not be {what} on {self.device}: {type(error).__name__}: {lines[0]}"
        )


def on(device: torch.device) -> Any:
    """Make a device the current one for a launch."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def warp_size(device: torch.device) -> int:
    """Threads a warp: 32 on NVIDIA and in the interpreter, 64 on AMD's data-centre GPUs."""
    if this_machine().interpreter:
        return 32
    with on(device):
        return int(driver.active.get_current_target().warp_size)
