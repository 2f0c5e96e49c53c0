"""benchmarks/gpu_session.py and parity.py, for the day a GPU is there: rehearsed, stopped, and out of time."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TRITON
from steps import every_step

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REHEARSED = ("parity", "bandwidth", "host time")  # a file each; most other parts are of these


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks, for one test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def imported(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return imported


def states(session: Path) -> dict[str, str]:
    return {name: part["state"] for name, part in json.loads(session.read_text())["parts"].items()}


@TRITON
def test_a_rehearsal_that_is_stopped_leaves_what_was_finished(tmp_path: Path) -> None:
    session, parts = tmp_path / "session.json", ",".join([*REHEARSED, "codecs"])
    command = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--rehearse", "--seconds", "1000"]
    # It is no worker of this session, and sees no GPU.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST_") and n != "TRITON_INTERPRET"}
    with subprocess.Popen(
        [*command, "--out", str(tmp_path), "--parts", parts],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not (session.exists() and states(session)["codecs"] == "cut off"):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert states(session) == {**dict.fromkeys(REHEARSED, "done"), "codecs": "cut off"}, (
        tmp_path / "session.log"
    ).read_text()
    found = json.loads(session.read_text())
    assert found["rehearsal"] is True
    assert found["versions"]["torch"] == torch.__version__
    results = {name: found["parts"][name]["results"] for name in REHEARSED}
    assert results["parity"]["failed"] == []
    assert set(results["parity"]["found"]) == {"SGD, momentum", "AdamW, amp"}
    for name in REHEARSED[1:]:
        (answers,) = results[name].values()
        assert answers["records"]
    assert {path.name for path in tmp_path.iterdir()} == {"session.json", "session.log"}


@TRITON
def test_a_first_launch_says_how_long_it_takes_and_on_what(tmp_path: Path) -> None:
    """What the part "compile times" runs several times, after all of torch was compiled to bytecode."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(BENCHMARKS / "first_launch.py"), "AdamW fp32", "warmup"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] > 0
    assert [kernel["kernel"] for kernel in found["kernels"]] == ["multi_tensor"]


def test_a_session_says_what_failed_was_stopped_shortened_and_dropped(tmp_path: Path, benchmarks: Any) -> None:
    module = benchmarks("gpu_session")
    write = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}'); "

    def part(name: str, seconds: float, least: float, code: str) -> Any:
        arguments = ("-c", write + code, "{out}")
        return module.Part(name, seconds, least, arguments, arguments)

    session = module.Session(tmp_path, module.RESERVE + 200, rehearses=False)
    parts = [
        part("works", 300, 1, "print('said')"),
        part("fails", 20, 1, "sys.exit(3)"),
        part("hangs", 0.5, 0.1, "time.sleep(60)"),
        part("too long", 600, 500, "pass"),
    ]
    assert session.run(parts) is False
    found = json.loads((tmp_path / "session.json").read_text())["parts"]
    assert states(tmp_path / "session.json") == {
        "works": "done",
        "fails": "failed with exit code 3",
        "hangs": "cut off after 0 s",
        "too long": "dropped",
    }
    assert "of 300 s" in found["works"]["shortened"]
    assert "shortened" not in found["fails"]
    assert found["works"]["last lines"] == ["said"]
    assert "it needs 500 s" in found["too long"]["why"]
    assert found["works"]["results"] == found["fails"]["results"] == {"half": 1}


@TRITON
def test_parity_sees_what_triton_computes(
    benchmarks: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = benchmarks("parity")
    monkeypatch.setattr(parity, "SHAPES", ((33, 5), (7,)))
    steps = every_step()
    for name in ("AdamW, clipped and averaged", "AdamW, bfloat16 split24, states None", "Muon, default"):
        found = parity.judged(steps[name], device, lambda: 0)
        assert found["passed"], (name, found)
    step, weights = steps["AdamW, default"], parity.weights

    def off(optimizer: Any, average: bool) -> Any:
        values = weights(optimizer, average)
        return [v + 1e-2 for v in values] if optimizer.backend == "triton" else values

    monkeypatch.setattr(parity, "weights", off)
    assert not parity.judged(step, device, lambda: 0)["passed"]


def test_a_case_of_parity_that_raises_is_a_failure(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parity = benchmarks("parity")

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(parity, "errors", broken)
    found = parity.judged(every_step()["AdamW, default"], torch.device("cpu"), lambda: 0)
    assert (found["passed"], found["error"]) == (False, "RuntimeError: no kernel image")
