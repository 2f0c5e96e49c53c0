"""One pytest run tests it all: with no GPU the Triton kernels run in the interpreter, on CPU tensors, and are compiled
in processes of their own; see child_process.py.
"""

import os

import child_process
import torch
from child_process import COMPILES, PIPE

HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()
INTERPRETS = not HAS_GPU and not COMPILES
if INTERPRETS:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is defined, so before any import of it

import atexit
import gc
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import ranks
import references_matrix
from gathering import look_at_all

from triton_optim.backends.compiled import graph as compiled_graph
from triton_optim.backends.compiled import norm as compiled_norm
from triton_optim.backends.triton import stub_driver
from triton_optim.dispatch import this_machine
from triton_optim.engine import plan
from triton_optim.optimizers.matrix import newton_schulz
from triton_optim.util import gather

# Hundreds of graphs are compiled here: with one slot each takes half the time. See `two_slots` for several; the
# examples, the demo and the benchmarks, in processes of their own, have them all.
compiled_graph.SLOTS = 1

# From the second step on gradients are gathered by C++, as in a training that has gone on for a while.
plan.STEPS = plan.WORTHWHILE = 1

# One folder of C++ libraries, and of what Triton compiles with the stub driver, for all processes of a run.
if PIPE in os.environ:
    os.environ["TRITON_CACHE_DIR"] = os.path.join(os.environ["TRITON_OPTIM_CACHE_DIR"], "triton")
elif "TRITON_OPTIM_CACHE_DIR" not in os.environ:
    os.environ["TRITON_OPTIM_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton_optim_tests_")
    atexit.register(shutil.rmtree, os.environ["TRITON_OPTIM_CACHE_DIR"], ignore_errors=True)

# Processes beside each other, each with a thread for every core, would wait for each other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# torch's Muon iterates in bfloat16, and ours where that is fast: nothing else could be compared. In tests that do not
# undo this, both iterate in the parameter's dtype, at least float32; torch's by the reference.
TORCHS_ITERATION = torch.optim._muon._zeropower_via_newtonschulz
OUR_ITERATED_IN = newton_schulz.iterated_in


def iterated_in(matrix: torch.Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)


def iteration(matrix: torch.Tensor, coefficients: tuple, steps: int, eps: float) -> torch.Tensor:
    wide = matrix.detach().cpu().to(iterated_in(matrix)).numpy()
    return torch.from_numpy(references_matrix.newton_schulz(wide, coefficients, steps, eps)).to(matrix.device)


newton_schulz.iterated_in = iterated_in
torch.optim._muon._zeropower_via_newtonschulz = iteration

# Of the torch that is installed: what it does depends on it in places.
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

LONG = ("test_accuracy", "test_compiled_steps", "test_audit", "test_codecs", "test_codec_checkpoints",
        "test_training_step", "test_torch_compile", "test_launch", "test_symmetric_product", "test_gpu_session",
        "test_symmetric_product_code", "test_two_ranks", "test_doctor", "test_stochastic_rounding",
        "test_gradients_come_and_go", "test_memory_traps", "test_race", "test_race_command", "test_example_scripts",
        "test_state_machine", "test_state_machine_twin")  # fmt: skip

HAS_TRITON = importlib.util.find_spec("triton") is not None


def patch_once() -> None:
    """Spare half of the interpreter's time: Triton patches its language anew for each function that a kernel calls."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patched(function: Any) -> Any:
        words = [m.load for m in function.__globals__.values() if m is tl or m is tl.core]
        if any(map(tl.core.is_builtin, [*words, tl.tensor.__add__])):  # what is patched already is no builtin any more
            return patch(function)
        return getattr(interpreter, "_LangPatchScope", list)()  # nothing to undo

    interpreter._patch_lang = patched


if HAS_TRITON and INTERPRETS:
    patch_once()

TRITON = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
CPP = pytest.mark.skipif(
    HAS_GPU or not this_machine().cpp, reason="the C++ backend needs a CPU, a compiler and Linux; a GPU is tested here"
)
# Every backend, as pytest parameters; what cannot run here says why.
BACKENDS = [
    pytest.param("eager"),
    pytest.param("compiled"),
    pytest.param("cpp", marks=CPP),
    pytest.param("triton", marks=TRITON),
]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(child_process)
    config.pluginmanager.register(ranks)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-costs", action="store_true", help="write the tables of tests/costs anew")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """An argument `backend` is each of them, unless the test says which."""
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = any("backend" in (mark.args[0] if mark.args else mark.kwargs["argnames"]) for mark in marks)
    if "backend" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("backend", BACKENDS)


def can_run(item: pytest.Item) -> bool:
    """An optimizer for sparse gradients runs eagerly only; that others are refused is tested in test_sparse.py."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return given.get("backend", "eager") == "eager" or not getattr(given.get("case"), "sparse", False)


def pytest_collection_finish() -> None:
    """What is there now is there until the end: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    """Nanobind, in which Triton is written, complains of what is not collected at the end."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = filter(can_run, items)
    # What takes minutes first: a file runs in one process, and the last would be waited for alone.
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))
        if item.get_closest_marker("compiled") and not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed"))


@pytest.fixture
def write_costs(request: pytest.FixtureRequest) -> bool:
    """Whether tables are written, and not compared; see costs.py."""
    return bool(request.config.getoption("--write-costs"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if HAS_GPU else torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def stub() -> None:
    """Where kernels are compiled they are launched by a driver that launches nothing."""
    if COMPILES and HAS_TRITON:
        stub_driver.install()


@pytest.fixture(scope="session", autouse=True)
def gathering() -> None:
    """What gathers gradients, compiled; where it cannot be, Python looks at them in all tests."""
    gather.library.load()


@pytest.fixture(params=["gathered", "looked at"])
def gradients_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what must be noticed of gradients: by C++, and by Python."""
    if request.param == "looked at":
        look_at_all(monkeypatch)
    elif gather.library.loaded is None:
        pytest.skip(f"nothing gathers gradients here: {gather.library.build_error}")


@pytest.fixture(scope="module")
def two_slots() -> Iterator[None]:
    """For files in which the tensors of a call might be taken for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_graph, "SLOTS", 2)
        for module, name in ((compiled_graph, "graph_for"), (compiled_graph, "codes_graph_for"),
                             (compiled_norm, "graph_for")):  # fmt: skip
            patch.setattr(module, name, cache(getattr(module, name).__wrapped__))
        yield


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def interpreter_loops() -> bool:
    """Triton 3.6's interpreter makes a loop's bound of an array of one element, which NumPy 2.4 refuses."""
    import triton

    return HAS_GPU or tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)


TRITON_LOOPS = HAS_TRITON and interpreter_loops()
needs_loops = pytest.mark.skipif(not TRITON_LOOPS, reason="no Triton, or an interpreter of it that NumPy broke")


@pytest.fixture
def launches(monkeypatch):
    """(programs, arguments, constants) of every launch of the Triton kernel, made as usual."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from launches import watch_launches

    seen = []

    def watch(launcher, programs, *arguments):
        kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        seen.append((programs, kept, launcher.constants))

    watch_launches(monkeypatch, watch)
    return seen
