"""Building of C++ libraries: what is kept, what is built ahead, and what happens where nothing can be built."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPP
from many_forms import Scalars, many_forms
from torch.nn import Parameter

import triton_optim
from triton_optim import SGD, RuleOptimizer
from triton_optim.backends import norms
from triton_optim.backends.compiled import norm as compiled_norm
from triton_optim.backends.cpp import norm as cpp_norm
from triton_optim.backends.cpp.source import source
from triton_optim.cli import doctor
from triton_optim.dispatch import cxx_compiler, this_machine
from triton_optim.kernels.straight import straight
from triton_optim.precision.codecs import codes, plain
from triton_optim.util import cpp_build, once

pytestmark = CPP
F32 = plain(torch.float32)


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
