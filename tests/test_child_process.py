"""Tests that run in a child process are reported as if they had run here; see child_process.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = """
import os, sys, time
import pytest

pytestmark = pytest.mark.compiled

@pytest.fixture(scope="module")
def process():
    yield os.getpid()
    print("module ended in", os.getpid())

@pytest.fixture
def broken():
    raise OSError("no such fixture's file")

def test_runs(process, tmp_path, capfd):
    assert os.environ["TRITON_INTERPRET"] == "0"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == ""

def test_fails(process):
    print("said by a test")
    left = [1, 2]
    assert left == [1, 3]

@pytest.mark.skip(reason="a reason to skip")
def test_skips(): ...

def test_has_a_broken_fixture(broken): ...

def test_ends_its_process():
    os.abort()

@pytest.mark.timeout(0.2)
def test_hangs():
    time.sleep(60)

@pytest.mark.parametrize("x", [1, 2])
def test_runs_on(x): ...

def test_is_last(process): ...
"""
INI = """[pytest]
addopts = -ra --strict-markers -n0 -p child_process
markers = compiled: in a child
filterwarnings = error
"""


def run(folder: Path, *words: str, interpret: str = "1") -> str:
    """What pytest prints for FILE beside an ordinary one."""
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_compiled.py").write_text(FILE)
    (folder / "test_here.py").write_text("import os\ndef test_here(): assert os.environ['TRITON_INTERPRET'] == '1'\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COLUMNS"))}
    environment |= {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("processes", ["0", "2"])
def test_reports_are_those_of_the_child(tmp_path: Path, processes: str) -> None:
    out = run(tmp_path, f"-n{processes}", "--dist=loadfile", "--durations=3")
    assert "3 failed, 5 passed, 1 skipped, 1 error in" in out, out
    assert "FAILED test_compiled.py::test_fails - assert [1, 2] == [1, 3]" in out
    assert "At index 1 diff: 2 != 3" in out  # assertions are rewritten
    assert "said by a test" in out
    assert "a reason to skip" in out
    assert "ERROR test_compiled.py::test_has_a_broken_fixture - OSError: no such fixture's file" in out
    assert "The child process that ran this test ended with code -6." in out
    assert re.search(r"Fatal Python error: Aborted\n(.*\n)+? .* in test_ends_its_process", out)
    assert re.search(r"FAILED test_compiled.py::test_hangs .*Timeout", out)
    assert re.search(r"0\.\d+s call +test_compiled.py::test_hangs", out)


def test_chosen_tests_run(tmp_path: Path) -> None:
    assert "3 passed, 7 deselected" in run(tmp_path, "-k", "runs_on or here")


def test_a_failure_ends_the_run(tmp_path: Path) -> None:
    out = run(tmp_path, "-x", "-s")
    assert "1 failed, 1 passed" in out
    assert "module ended in" in out  # its fixtures, too


def test_a_file_that_cannot_be_collected_there_says_why(tmp_path: Path) -> None:
    text = "import os, pytest\npytestmark = pytest.mark.compiled\n"
    text += "assert os.environ['TRITON_INTERPRET'] == '1', 'here only'\ndef test(): ...\n"
    (tmp_path / "test_other.py").write_text(text)
    out = run(tmp_path, "test_other.py")
    assert "1 failed" in out
    assert "AssertionError: here only" in out


def test_without_the_interpreter_there_is_no_child(tmp_path: Path) -> None:
    out = run(tmp_path, "test_compiled.py", "-k", "test_runs or last", interpret="0")
    assert "FAILED test_compiled.py::test_runs - AssertionError" in out  # no GPU was hidden from it
    assert "1 failed, 3 passed" in out
