"""One pytest run tests it all: with no GPU the Triton kernels run in the interpreter, on CPU tensors."""

import os

import torch

HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is defined, so before any import of it

import importlib.util

import pytest

from triton_optim import compiled_backend

# Hundreds of graphs are compiled here: with half the slots each takes half the time. The examples, the demo and the
# benchmarks, in processes of their own, have them all.
compiled_backend.SLOTS = 2

# Processes beside each other, each with a thread for every core, would wait for each other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
# Every backend, as pytest parameters; what cannot run here says why.
BACKENDS = [pytest.param("eager"), pytest.param("compiled"), pytest.param("triton", marks=TRITON)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """An argument `backend` is each of them, unless the test says which."""
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = any("backend" in (mark.args[0] if mark.args else mark.kwargs["argnames"]) for mark in marks)
    if "backend" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("backend", BACKENDS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if HAS_GPU else torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
