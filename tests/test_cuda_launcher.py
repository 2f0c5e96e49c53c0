"""What Triton's own CUDA driver packs for a launch, told by a libcuda that does nothing: see fake_cuda.c."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import POINTER, c_float, c_int32, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
from launches import replace_launches
from steps import BF16, F32, WHOLE, Step
from stub_launches import address, forget_kernels
from torch import Tensor

from triton_optim import AdamW, dispatch
from triton_optim.backends.triton import stub_driver
from triton_optim.backends.triton.launch import Launcher

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc was not found, which builds Triton's driver"),
]

CPU = torch.device("cpu")
STREAM = 0x5EED0
STEPS = {
    "by value": Step(AdamW, F32, {}),
    "by value, random": Step(AdamW, BF16, {"param_precision": "stochastic"}),
    "table": Step(AdamW, torch.float64, {}),
    "amp, clipped and averaged": Step(AdamW, F32, WHOLE | {"amp": "fused"}),
    "capturable": Step(AdamW, F32, {"capturable": True}),
}


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )


class Asked(NamedTuple):
    """A launch as the package asks for it: what is not a constant, one after the other."""

    launcher: Launcher
    programs: int
    arguments: list[Any]


class Packed(NamedTuple):
    """A launch as CUDA gets it."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    stream: int
    function: int
    arguments: list[Any]


@dataclass(frozen=True)
class Table:
    """An address that is given in place of its tensor, as Triton takes one."""

    at: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.at


def with_tables(launcher: Launcher, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments, of which an int is a number."""
    given = zip(arguments, launcher.types, strict=True)
    return [Table(a, kind) if isinstance(a, int) and isinstance(kind, torch.dtype) else a for a, kind in given]


def flat(arguments: list[Any]) -> list[Any]:
    return [x for a in arguments for x in (a if type(a) is tuple else (a,))]


def unpacked(params: Any, given: list[Any]) -> list[Any]:
    """The parameters of a launch, each of the type of what was given for it. Triton adds its own."""
    kinds = [
        c_uint64 if isinstance(x, (Tensor, Table)) else c_float if isinstance(x, float) else c_int32 for x in given
    ]
    return [ctypes.cast(params[i], POINTER(kind))[0] for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The library in the place of libcuda.so.1."""
    try:
        ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        pass
    else:
        pytest.skip("the CUDA driver of this machine was loaded before")
    folder = tmp_path_factory.mktemp("cuda")
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", path], check=True)
    (folder / "libcuda.so").symlink_to(path)  # what Triton 3.4 links
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        yield ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def by_triton(launcher: Launcher, programs: int, *arguments: Any) -> None:
    """A launch by Triton's `JITFunction.run`."""
    launcher.kernel[(programs,)](*arguments, **launcher.constants)


@pytest.fixture(params=["Launcher", "JITFunction.run"])
def packed(
    request: pytest.FixtureRequest, libcuda: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[Asked, Packed]]]:
    """Every launch, by Triton's driver for CUDA, of a GPU that is not there."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    launches: list[tuple[Asked, Packed]] = []
    asked: list[Asked] = []

    @ctypes.CFUNCTYPE(None, POINTER(Config), c_void_p, POINTER(c_void_p))
    def on_launch(config: Any, function: int, params: Any) -> None:
        one = config.contents
        arguments = unpacked(params, asked[-1].arguments)
        launches.append((asked[-1], Packed(tuple(one.grid), tuple(one.block), one.stream, function, arguments)))

    def ask(launcher: Launcher, programs: int, *arguments: Any) -> None:
        given = with_tables(launcher, arguments)
        asked.append(Asked(launcher, programs, flat(given)))
        launch(launcher, programs, *given)

    libcuda.tell(on_launch)
    active = CudaDriver()
    active.get_current_device = lambda: 9  # no other test's
    active.get_device_capability = lambda device: (9, 0)
    active.get_current_stream = lambda device: STREAM
    unload_kernels()
    driver.set_active(active)
    monkeypatch.setattr(dispatch, "stub_driver", active)
    dispatch.this_machine.cache_clear()
    launch = replace_launches(monkeypatch, ask)
    if request.param == "JITFunction.run":
        launch = by_triton
    yield launches
    unload_kernels()
    stub_driver.install()


def unload_kernels() -> None:
    """Each driver unloads its own."""
    forget_kernels()
    gc.collect()


@pytest.mark.parametrize("name", STEPS)
def test_cuda_gets_what_the_kernel_takes(name: str, packed: list[tuple[Asked, Packed]]) -> None:
    optimizer = STEPS[name].optimizer("triton", CPU)
    for _ in range(2):
        STEPS[name].give_gradients(optimizer)
        optimizer.step()
    assert packed
    for asked, got in packed:
        assert got.grid == (asked.programs, 1, 1)
        assert got.block == (32 * asked.launcher.constants["num_warps"], 1, 1)
        assert got.stream == STREAM
        wanted = [c_float(x).value if isinstance(x, float) else address(x) for x in asked.arguments]
        assert got.arguments == wanted
    functions = {repr((asked.launcher.kernel, asked.launcher.constants)): got.function for asked, got in packed}
    assert len(functions) == len(set(functions.values())) == len({got.function for _, got in packed})
