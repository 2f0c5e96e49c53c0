"""Triton's own launch path where there is no GPU: a driver that loads nothing and launches nothing.

Triton's ``kernel[grid](...)`` binds the arguments, specializes, forms the cache key, compiles and packs the call. The
interpreter does none of it, nor does compiling an ``ASTSource``. With this driver active CPU tensors go all of that way
as a GPU's would; only the last call, into CUDA's or HIP's driver, is replaced: it is handed to `on_launch`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ... import dispatch

Target = tuple[str, "int | str", int]  # Triton's name of the platform, the architecture, threads a warp

TARGETS: dict[str, Target] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Launched(NamedTuple):
    """A launch, as the driver was told of it."""

    name: str
    grid: tuple[int, int, int]
    stream: int
    signature: dict[str, Any]  # of each argument its type, as Triton writes it; "constexpr" for constants
    arguments: tuple[Any, ...]  # those of the kernel, constants included
    metadata: Any  # the compiled kernel's
    function: Any  # what loading it returned

    def values(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.signature, self.arguments, strict=True))

    @property
    def ptx(self) -> str:
        """The code, as Triton keeps it on disk; of NVIDIA targets."""
        from triton.runtime.cache import get_cache_manager

        path = get_cache_manager(self.metadata.hash).get_file(f"{self.name}.ptx")
        return Path(path).read_text()


class Launcher:
    """What Triton makes for each compiled kernel, and calls to launch it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature, self._metadata = source.signature, metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Any,
        packed: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        active = dispatch.stub_driver
        if active is not None and active.on_launch is not None:
            metadata = self._metadata
            active.on_launch(Launched(metadata.name, (x, y, z), stream, self._signature, arguments, metadata, function))


class Utils:
    """What Triton asks of a driver about devices and binaries."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """The module, the function, registers, spills, and the most threads of a program."""
        return object(), object(), 64, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Shared memory: what the largest GPUs have, so that the compiler's own limits are met, not this one's."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class StubDriver:
    """A driver of one GPU that is not there.

    Args:
        target: one of ``TARGETS``.
        on_launch: called with each launch.
    """

    launcher_cls = Launcher

    def __init__(self, target: str, on_launch: Callable[[Launched], None] | None = None) -> None:
        from triton.backends.compiler import GPUTarget

        self.name, self.on_launch, self.utils = target, on_launch, Utils()
        self._target = GPUTarget(*TARGETS[target])
        self._device = list(TARGETS).index(target)

    def get_current_target(self) -> Any:
        """What kernels are compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """A number for each target: Triton keeps what it compiled by device."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> Any:
        """Where tensors lie."""
        import torch

        return torch.device("cpu")


def installed() -> StubDriver | None:
    """The stub driver that is active; None where Triton's own is."""
    active: StubDriver | None = dispatch.stub_driver
    return active


def install(target: str = "sm_90", on_launch: Callable[[Launched], None] | None = None) -> StubDriver:
    """Make a stub driver Triton's active one, for this process: Triton takes CPU tensors for a GPU's.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ``"sm_100"`` or ``"gfx942"``.
        on_launch: called with each launch.

    Raises:
        RuntimeError: Triton's interpreter is on: nothing would be compiled.
    """
    if dispatch.this_machine().interpreter:
        raise RuntimeError("TRITON_INTERPRET is set: Triton compiles nothing then. Unset it for this process.")
    from triton.runtime import driver

    active = dispatch.stub_driver = StubDriver(target, on_launch)
    driver.set_active(active)
    dispatch.this_machine.cache_clear()
    return active
