"""The C++ backend: what a rule becomes, the bits of a step, and what happens where nothing can be built."""

from __future__ import annotations

import itertools
import math
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CPP
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim import SGD, RuleOptimizer
from triton_optim.backends import norms
from triton_optim.backends.compiled import norm as compiled_norm
from triton_optim.backends.cpp import chunks as cpp_chunks
from triton_optim.backends.cpp import norm as cpp_norm
from triton_optim.backends.cpp.source import source
from triton_optim.buckets.gradient_norm import Norm, eager_partial_norms, norm_from
from triton_optim.cli import doctor
from triton_optim.dispatch import cxx_compiler, this_machine
from triton_optim.kernels.language import abs, jit, sqrt, where
from triton_optim.kernels.straight import straight
from triton_optim.precision.codecs import codes, plain
from triton_optim.spec import State
from triton_optim.util import cpp_build, once

pytestmark = CPP
BF16 = torch.bfloat16
F32 = plain(torch.float32)


class Scalars(NamedTuple):
    lr: float
    beta: float


class Momentum(RuleOptimizer):
    """An optimizer from whatever rule a test brings."""

    states = (State("momentum"),)

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "beta": beta}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], group["beta"])


def optimizer_of(a_rule: Any) -> type[RuleOptimizer]:
    return type("Momentum", (Momentum,), {"rule": a_rule})


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for libraries, in a process that has built none and said nothing."""
    from triton_optim.backends.cpp import bucket as cpp_backend

    def forget() -> None:
        for remembered in (cpp_backend.step_of, cpp_norm.sums_of, this_machine):
            remembered.cache_clear()

    monkeypatch.setenv("TRITON_OPTIM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpp_build, "_failed", {})
    monkeypatch.setattr(cpp_build, "_begun", {})
    monkeypatch.setattr(cpp_build, "_asked", set())
    monkeypatch.setattr(once, "_said", set())
    forget()
    yield tmp_path / "cache"
    for thread in cpp_build._begun.values():
        thread.join()
    monkeypatch.undo()
    forget()


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def one_step(**options: Any) -> tuple[Parameter, RuleOptimizer]:
    p = Parameter(torch.ones(5))
    p.grad = torch.full((5,), 2.0)
    optimizer = triton_optim.SGD([p], lr=0.25, **options)
    optimizer.step()
    return p, optimizer


# What a rule becomes.


@jit
def half(x):
    return 0.5 * x


FACTOR = 3


@jit
def many_forms(p, g, momentum, h):
    """Tuples, calls, constants, conditions on constants."""
    both = (g, momentum)
    g, momentum = both[0] + FACTOR - 3, -both[1] * -1
    if FACTOR == 3 and not FACTOR > 4:
        momentum *= h.beta
    else:
        momentum = p
    momentum += half(g) if FACTOR >= 2 else g
    big = (g > 1) | (g <= -1.0) & ~(g == 5)
    return p - h.lr * where(big, momentum, sqrt(abs(momentum))), momentum


def test_all_forms_of_the_language_are_followed() -> None:
    random = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(1000, generator=random), torch.randn(1000, generator=random) * 2
    found = []
    for backend in ("eager", "cpp"):
        p = Parameter(start.clone())
        optimizer = optimizer_of(many_forms)([p], backend=backend)
        for _ in range(3):
            p.grad = gradient.clone()
            optimizer.step()
        found.append((p.detach(), optimizer.state[p]["momentum"]))
    for ours, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


# The bits of a step.

LENGTHS = [0, 1, 15, 16, 17, 255, 257, 4097, cpp_chunks.CHUNK - 1, cpp_chunks.CHUNK + 1, 3 * cpp_chunks.CHUNK + 7]


def trained(backend: str, dtype: torch.dtype, offset: int = 0, threads: int = 1, **options: Any) -> list[Tensor]:
    """Parameters and states of Lion, which takes no root: torch's own is not the nearest number to it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        random = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(n + offset, generator=random).to(dtype)[offset:]) for n in LENGTHS]
        optimizer = triton_optim.Lion(params, lr=0.01, weight_decay=0.1, backend=backend, **options)
        for k in range(3):
            for i, p in enumerate(params):
                p.grad = None if (i + k) % 4 == 3 else torch.randn(len(p), generator=random).to(dtype)
            optimizer.step()
        return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]
    finally:
        torch.set_num_threads(before)


KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {"ema_decay": 0.9}),
    "float16": (torch.float16, {}),
    "bfloat16": (BF16, {"ema_decay": 0.9, "ema_dtype": BF16}),
    "stochastic": (BF16, {"param_precision": "stochastic", "state_dtype": BF16}),
    "half stochastic": (torch.float16, {"param_precision": "stochastic", "state_dtype": "int4"}),
    "kahan": (BF16, {"param_precision": "kahan", "state_dtype": "int8"}),
    "split24": (BF16, {"param_precision": "split24", "state_dtype": "int4", "ema_decay": 0.9}),
    "split32": (torch.float16, {"param_precision": "split32", "state_dtype": torch.float32}),
    "master": (BF16, {"param_precision": "master", "state_dtype": "int8", "ema_decay": 0.9}),
}


@pytest.mark.parametrize("name", KEPT)
def test_every_bit_is_the_eager_backends(name: str) -> None:
    """Nothing is contracted, reassociated or approximated, and the random bits are the same."""
    dtype, options = KEPT[name]
    for ours, expected in zip(trained("cpp", dtype, **options), trained("eager", dtype, **options), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "stochastic", "split24"])
def test_threads_and_alignment_change_no_bit(name: str) -> None:
    dtype, options = KEPT[name]
    expected = trained("cpp", dtype, **options)
    for offset, threads in ((1, 1), (0, 2), (3, 5)):
        found = trained("cpp", dtype, offset, threads, **options)
        shifted = trained("eager", dtype, offset, **options) if offset else expected
        assert all(map(torch.equal, found, shifted))


def every_bit(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.fixture
def by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """From where it is called on, libraries are for any processor of this kind, even one without AVX2 and F16C."""
    from triton_optim.backends.cpp import bucket as cpp_backend

    def forget() -> None:
        cpp_backend.step_of.cache_clear()
        cpp_norm.sums_of.cache_clear()

    def start() -> None:
        forget()
        flags = tuple(flag for flag in cpp_build.FLAGS if not flag.startswith("-m"))
        for module in (cpp_backend, cpp_norm):
            monkeypatch.setattr(module, "library", partial(cpp_build.library, flags=flags))

    yield start
    monkeypatch.undo()
    forget()


# Whole rows, converted by the processor and without it, and less than one.
as_many = pytest.mark.parametrize(
    ("length", "processor"), [(2**20, True), (2**20, False), (31, True)], ids=["rows", "by arithmetic", "less"]
)


@as_many
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_and_made(
    dtype: torch.dtype, length: int, processor: bool, by_arithmetic: Callable[[], None]
) -> None:
    """Subnormal ones, infinities and NaN too: a step without a learning rate."""
    if not processor:
        by_arithmetic()
    values = every_bit(dtype)
    params = [Parameter(own.clone()) for own in values.split(length)]
    for p in params:
        p.grad = torch.zeros_like(p)
    triton_optim.Lion(params, lr=0.0, weight_decay=0.0, backend="cpp").step()
    found = torch.cat([p.detach() for p in params])
    assert torch.equal(found.isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(found[known].view(torch.int16), values[known].view(torch.int16))


@as_many
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_rounding_is_to_the_nearest_even(
    dtype: torch.dtype, length: int, processor: bool, by_arithmetic: Callable[[], None]
) -> None:
    """What lies between two neighbours, and half-way: the state takes the gradient as it is."""
    if not processor:
        by_arithmetic()
    wide = every_bit(dtype).float()
    wide = wide[wide.isfinite()]
    eps = torch.finfo(dtype).eps
    g = torch.cat([wide * factor for factor in (1, 1 + eps / 2, 1 + eps / 4, 1 + 3 * eps / 4, 1 - eps / 2)])
    g = torch.cat([g, torch.tensor([1e-45, -1e-40, 3e-8, 65519.9, 65520.0, -1e38, math.inf, -math.inf])])
    params = [Parameter(torch.zeros(len(own))) for own in g.split(length)]
    optimizer = triton_optim.SGD(params, lr=0.0, momentum=1.0, backend="cpp")
    for p, own in zip(params, g.split(length), strict=True):
        p.grad = own.clone()
        optimizer.state[p]["momentum_buffer"] = torch.zeros(len(own), dtype=dtype)
    optimizer.step()
    found = torch.cat([optimizer.state[p]["momentum_buffer"] for p in params])
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.int16), (g + 0.0).to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_sums_round_to_the_nearest_even(dtype: torch.dtype) -> None:
    """As above where nothing else is kept: sums of two numbers of 16 bits, beyond the largest too."""
    values = every_bit(dtype)
    values = values[values.isfinite()]
    eps = torch.finfo(dtype).eps
    for share in (eps / 2, eps / 4, 3 * eps / 4, -eps / 2):
        p = Parameter(torch.zeros_like(values))
        p.grad = (values.float() * share).to(dtype)
        optimizer = triton_optim.SGD([p], lr=0.0, momentum=1.0, backend="cpp")
        optimizer.state[p]["momentum_buffer"] = values.clone()
        optimizer.step()
        expected = (values.float() + p.grad.float()).to(dtype)
        assert torch.equal(optimizer.state[p]["momentum_buffer"].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "stochastic", "split32"])
def test_what_the_processor_has_changes_no_bit(name: str, by_arithmetic: Callable[[], None]) -> None:
    dtype, options = KEPT[name]
    expected = trained("cpp", dtype, **options)
    by_arithmetic()
    assert all(map(torch.equal, trained("cpp", dtype, **options), expected))


def test_subnormal_numbers_are_not_flushed() -> None:
    p = Parameter(torch.full((64,), 1e-42))
    p.grad = torch.full((64,), 1e-43)
    triton_optim.SGD([p], lr=1.0, backend="cpp").step()
    assert torch.equal(p.detach(), torch.full((64,), 1e-42) - torch.full((64,), 1e-43))


def test_an_index_goes_past_2_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of a sharded parameter: its elements are numbered on, and the upper half of the index counts."""
    from triton_optim.buckets import bucket

    first = 2**32 - 1005  # no whole rows before it
    monkeypatch.setattr(bucket, "first_index", lambda p: first)
    found = [trained(backend, BF16, param_precision="stochastic", state_dtype=BF16) for backend in ("cpp", "eager")]
    monkeypatch.setattr(bucket, "first_index", lambda p: 0)
    other = trained("cpp", BF16, param_precision="stochastic", state_dtype=BF16)
    assert not all(map(torch.equal, found[0], other))
    assert all(map(torch.equal, *found))


# The norm.


@pytest.mark.parametrize("power", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16, torch.float16], ids=str)
def test_the_norm_has_the_same_bits_for_any_number_of_threads(power: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=random).to(dtype) for n in LENGTHS]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(cpp_norm.partial_norms(tensors, Norm(power)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
    exact = norm_from(eager_partial_norms(tensors, Norm(power)), Norm(power))
    torch.testing.assert_close(norm_from(found[0], Norm(power)), exact, rtol=1e-13, atol=0)
    for bad in (math.nan, -math.inf):
        tensors[-1][-1] = bad
        spoilt = cpp_norm.partial_norms(tensors, Norm(power))
        assert spoilt[:, 1].sum() == 1
        assert torch.equal(norm_from(spoilt, Norm(power)).isnan(), torch.tensor(math.isnan(bad)))


# How work is shared out.


def test_chunks_hold_every_element_once() -> None:
    chunks = cpp_chunks.Chunks(LENGTHS)
    covered = [torch.zeros(n, dtype=torch.int64) for n in LENGTHS]
    for tensor, start, stop in chunks.chunks.tolist():
        assert 0 < stop - start <= cpp_chunks.CHUNK
        assert start % 256 == 0
        covered[tensor][start:stop] += 1
    assert all((c == 1).all() for c in covered)
    bounds = chunks.first.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(chunks)
    sizes = (chunks.chunks[:, 2] - chunks.chunks[:, 1]).tolist()
    portions = [sum(sizes[a:b]) for a, b in itertools.pairwise(bounds)]
    assert all(0 < portion < 2 * cpp_chunks.CHUNK for portion in portions)


def test_no_thread_is_woken_for_tiny_work() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cpp_chunks.Chunks([100] * 10).threads() == 1
        assert cpp_chunks.Chunks([100_000]).threads() == 3
    finally:
        torch.set_num_threads(before)


# Nothing to build it with.


def test_a_library_is_built_once_and_kept(fresh: Path) -> None:
    one_step(backend="cpp")
    (library,) = fresh.glob("*.so")
    written = library.stat().st_mtime_ns
    from triton_optim.backends.cpp import bucket as cpp_backend

    cpp_backend.step_of.cache_clear()
    p, _ = one_step(backend="cpp")
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [written]
    assert p.tolist() == [0.5] * 5


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_corrupt_library_is_built_again(damage: str, fresh: Path) -> None:
    one_step(backend="cpp")
    (library,) = fresh.glob("*.so")
    whole = library.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "altered": whole[:3000] + b"\0" * 64 + whole[3064:], "empty": b""}
    library.unlink()  # the file itself is in use
    library.write_bytes(broken[damage])
    from triton_optim.backends.cpp import bucket as cpp_backend

    cpp_backend.step_of.cache_clear()
    p, _ = one_step(backend="cpp")
    assert p.tolist() == [0.5] * 5
    assert cpp_build.is_whole(library)


BROKEN = {
    "failing": ("echo 'fatal error: no space left' >&2; exit 1", "fatal error: no space left"),
    "hanging": ("sleep 100", r"did not end within 0\.3 s"),
    "lying": ("exit 0", "cannot be kept"),  # it makes nothing
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize("kind", BROKEN)
def test_a_compiler_that_builds_nothing(
    kind: str, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, reason = BROKEN[kind]
    compiler = fake_compiler(tmp_path, script)
    monkeypatch.setattr(cpp_build, "cxx_compiler", lambda: compiler)  # torch's compiler keeps its own
    monkeypatch.setattr(cpp_build, "TIME_LIMIT", 0.3)
    with pytest.warns(RuntimeWarning, match=f"the cpp backend failed to compile: .*{reason}.*compiled backend") as said:
        p, optimizer = one_step()
    assert len(said) == 1
    assert p.tolist() == [0.5] * 5
    (bucket,) = triton_optim.explain(optimizer)
    assert bucket.backend == "compiled"
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error", RuntimeWarning)
        assert one_step()[0].tolist() == [0.5] * 5
    with pytest.raises(RuntimeError, match=rf'backend="cpp" cannot run SGD: .*{reason}'):
        one_step(backend="cpp")
    assert not list(fresh.glob("*")) or kind == "lying"


def test_a_hanging_compiler_is_waited_for_once(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    compiler = fake_compiler(tmp_path, f"echo >> {asked}; sleep 100")
    monkeypatch.setattr(cpp_build, "cxx_compiler", lambda: compiler)
    monkeypatch.setattr(cpp_build, "TIME_LIMIT", 0.3)
    for text in ("one", "two"):
        with pytest.raises(cpp_build.BuildError, match="did not end"):
            cpp_build.library(text)
    assert asked.read_text().count("\n") == 1


def test_no_compiler_at_all(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cxx_compiler() is None
    with pytest.raises(cpp_build.BuildError, match=r"no C\+\+ compiler"):
        cpp_build.library("")
    _, optimizer = one_step()
    (bucket,) = triton_optim.explain(optimizer)
    assert bucket.backend == "eager"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own compiler
def test_a_folder_that_cannot_be_written(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the folder should: root may write anywhere else."""
    place = tmp_path / "file"
    place.write_text("")
    place.chmod(stat.S_IREAD)
    monkeypatch.setenv("TRITON_OPTIM_CACHE_DIR", str(place / "cache"))
    with pytest.warns(RuntimeWarning, match="libraries cannot be kept in .*file/cache.*TRITON_OPTIM_CACHE_DIR") as said:
        p, _ = one_step()
    assert len(said) == 1
    assert p.tolist() == [0.5] * 5
    with pytest.raises(RuntimeError, match="cannot be kept"):
        one_step(backend="cpp")


def test_ctrl_c_ends_the_compiler_and_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    compiler = fake_compiler(tmp_path, f"sleep 100 & echo $! > {started}; wait")

    def interrupted(self: Any, **_: Any) -> None:
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpp_build.run([compiler])
    place = Path("/proc", started.read_text().strip(), "stat")

    def goes_on() -> bool:
        try:
            return place.read_text().split()[2] != "Z"  # whoever inherited it may not have taken note of its end
        except OSError:
            return False

    for _ in range(500):
        if not goes_on():
            break
        time.sleep(0.01)
    assert not goes_on()


BUILDER = """
    import torch
    import triton_optim
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.full((5,), 2.0)
    triton_optim.SGD([p], lr=0.25, backend="cpp").step()
    assert p.tolist() == [0.5] * 5
"""


def test_processes_build_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_OPTIM_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(BUILDER)]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, complaint = process.communicate(timeout=200)
        assert process.returncode == 0, complaint
    assert len(list(tmp_path.iterdir())) == 1, "something temporary was left"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own compiler
def test_clipping_alone_falls_back_too(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fake_compiler(tmp_path, "exit 3")
    monkeypatch.setattr(cpp_build, "cxx_compiler", lambda: compiler)
    p = Parameter(torch.zeros(20))
    p.grad = torch.full((20,), 3.0)
    monkeypatch.setattr(norms, "_instead", {})
    with pytest.warns(RuntimeWarning, match="takes the norm instead"):
        norm = triton_optim.clip_grad_norm_([p], 1.0)
    assert float(norm) == pytest.approx(math.sqrt(180))


def test_clipping_where_nothing_compiles(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly, at last; and what failed is not tried again."""
    compiler, tried = fake_compiler(tmp_path, "exit 3"), []

    def refuse(*arguments: Any) -> None:
        tried.append(arguments)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_build, "cxx_compiler", lambda: compiler)
    monkeypatch.setattr(compiled_norm, "graph_for", refuse)
    monkeypatch.setattr(norms, "_instead", {})
    p = Parameter(torch.zeros(40_000))
    for turn in range(2):
        p.grad = torch.full((40_000,), 3.0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            norm = triton_optim.clip_grad_norm_([p], 1.0)
        assert float(norm) == pytest.approx(600)
        assert len(said) == (0 if turn else 2)
    assert len(tried) == 1


def test_no_home_directory(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a number: HOME is not set, and there is no entry of the user."""
    for name in ("HOME", "XDG_CACHE_HOME", cpp_build.CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)

    def nobody(number: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(compiled_norm, "graph_for", lambda *_: pytest.fail("the gradient is too small for a graph"))
    monkeypatch.setattr(norms, "_instead", {})
    p = Parameter(torch.zeros(20))
    p.grad = torch.full((20,), 3.0)
    with pytest.warns(RuntimeWarning, match="no home directory; set TRITON_OPTIM_CACHE_DIR"):
        norm = triton_optim.clip_grad_norm_([p], 1.0)
    assert float(norm) == pytest.approx(math.sqrt(180))
    assert "no home directory" in doctor.libraries()
    optimizer = triton_optim.SGD([p], lr=1.0, backend="cpp")
    with pytest.raises(RuntimeError, match="no home directory; set TRITON_OPTIM_CACHE_DIR"):
        optimizer.step()


def test_codes_of_blocks_wait_for_their_scale() -> None:
    """The largest of a block is found between two loops."""
    text = source(straight(many_forms), Scalars, (F32, codes("int8", False)), torch.float32, False)
    assert "absmax<256>(" in text


# Begun when an optimizer is made.


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"state_dtype": torch.bfloat16}], ids=str)
def test_a_new_optimizer_begins_to_build_what_its_first_step_needs(
    name: str, options: dict[str, Any], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
    p = Parameter(torch.ones(5))
    optimizer = getattr(triton_optim, name)([p], **own, **options)
    (thread,) = cpp_build._begun.values()
    thread.join()
    assert len(list(fresh.glob("*.so"))) == 1
    monkeypatch.setattr(cpp_build, "run", lambda *_: pytest.fail("the first step compiles"))
    p.grad = torch.ones(5)
    optimizer.step()
    assert [bucket.backend for bucket in triton_optim.explain(optimizer)] == ["cpp"]


def test_the_first_step_waits_for_what_was_begun(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands, go, run = [], threading.Event(), cpp_build.run

    def later(command: list[str], temporary: str | None = None) -> str:
        commands.append(command)
        assert go.wait(60)
        return run(command, temporary)

    monkeypatch.setattr(cpp_build, "run", later)
    p = Parameter(torch.ones(5))
    optimizers = [SGD([p], lr=0.25) for _ in range(2)]
    p.grad = torch.full((5,), 2.0)
    threading.Timer(0.2, go.set).start()
    optimizers[0].step()
    assert go.is_set()
    assert p.tolist() == [0.5] * 5
    assert len(commands) == 1


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_what_another_backend_runs_begins_nothing(backend: str, fresh: Path) -> None:
    SGD([Parameter(torch.ones(5))], lr=0.25, backend=backend)
    SGD([Parameter(torch.ones(5, dtype=torch.complex64))], lr=0.25)
    assert not cpp_build._begun


def test_scalars_is_not_called_for_it(fresh: Path) -> None:
    class Counting(SGD):
        calls = 0

        def scalars(self, group: dict[str, Any], step: Any) -> Any:
            self.calls += 1
            return super().scalars(group, step)

    assert Counting([Parameter(torch.ones(5))], lr=0.25).calls == 0


LEAVES = """
    import sys, time, torch, triton_optim
    from triton_optim.util import cpp_build
    optimizer = triton_optim.SGD([torch.nn.Parameter(torch.ones(5))], lr=0.25)
    while not cpp_build._running:
        time.sleep(0.001)
"""


def test_a_process_that_ends_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_OPTIM_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(LEAVES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


FORKS = """
    import os, torch, triton_optim
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = triton_optim.SGD([p], lr=0.25)
    p.grad = torch.full((5,), 2.0)
    child = os.fork()
    optimizer.step()
    assert p.tolist() == [0.5] * 5
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_builds_what_its_parent_had_begun(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_OPTIM_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(FORKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(tmp_path.iterdir())) == 1
