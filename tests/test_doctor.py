"""`triton-optim doctor`: a launch in a process of its own, where it works and in every way in which it does not."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU

import triton_optim
from triton_optim.cli import doctor, launch_check, main
from triton_optim.dispatch import BACKENDS, this_machine

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: nothing is launched")
# The process reads this when it starts, and is then as if its driver did so.
BROKEN = """
from triton_optim.backends.triton.stub_driver import {owner}
def broken(*_):
    {does}
{owner}.{method} = broken
"""


def broken_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, owner: str, method: str, does: str) -> None:
    (folder / "sitecustomize.py").write_text(BROKEN.format(owner=owner, method=method, does=does))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@needs_triton
def test_a_launch_works_and_is_told_with_and_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(path)]) == 0
    launches = json.loads(path.read_text())["triton_launches"]
    assert [launch["where"] for launch in launches] == launch_check.places()
    assert all(launch["works"] and launch["launches"] == 6 for launch in launches)
    out = capsys.readouterr().out
    for launch in launches:
        assert doctor.words(launch) in out


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="it breaks the stub driver, which is used where there is no GPU")
@pytest.mark.parametrize(
    ("stage", "owner", "method", "does"),
    [
        ("compile", "StubDriver", "get_current_target", "raise OSError('no space left on device')"),
        ("load", "Utils", "load_binary", "raise RuntimeError('no space left on device')"),
        ("launch", "Launcher", "__call__", "raise RuntimeError('no space left on device')"),
        ("launch", "Launcher", "__call__", "import os; print('no space left on device', file=__import__('sys').stderr);"
         " os._exit(139)"),
    ],
    ids=["compile", "load", "launch", "crash"],
)  # fmt: skip
def test_a_failure_says_where_and_what_to_do(
    stage: str, owner: str, method: str, does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_driver(tmp_path, monkeypatch, owner, method, does)
    found = launch_check.check_launch("sm_90")
    assert (found["works"], found["stage"]) == (False, stage)
    assert "no space left on device" in found["error"]
    assert found["advice"] == launch_check.ADVICE[stage]


@needs_triton
def test_a_hang_is_stopped() -> None:
    found = launch_check.check_launch("sm_90", timeout=0.01)
    assert (found["works"], found["stage"]) == (False, "start")
    assert found["error"].startswith("stopped after 0.01 s")


def test_a_failed_launch_is_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"where": "cuda", "works": False, "stage": "load", "error": "no kernel image", "advice": "Update it."}
    monkeypatch.setattr(doctor, "places", lambda: ["cuda"])
    monkeypatch.setattr(doctor, "check_launch", lambda where: failed)
    monkeypatch.setattr(doctor, "this_machine", lambda: this_machine()._replace(triton=True))
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 1
    assert json.loads((tmp_path / "found.json").read_text())["triton_launches"] == [failed]
    out = capsys.readouterr().out
    assert "cuda: FAILED at the stage 'load': no kernel image" in out
    assert "Update it." in out


def test_its_choices_are_those_that_optimizers_get(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device
) -> None:
    """What runs by itself, what may be pinned, and nothing else."""
    monkeypatch.setattr(doctor, "places", list)  # nothing is launched
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    choices = [c for c in json.loads((tmp_path / "found.json").read_text())["choices"] if c["device"] == device.type]
    assert [c["dtype"] for c in choices] == ["float32", "bfloat16", "float16", "float64", "complex64"]
    for choice in choices:
        p = torch.nn.Parameter(torch.ones(3, dtype=getattr(torch, choice["dtype"]), device=device))
        (bucket,) = triton_optim.explain(triton_optim.AdamW([p]))
        assert (choice["present"], choice["backend"]) == (True, bucket.backend)
        assert choice["reason"] == bucket.reason
        assert choice["reason"] in out
        for backend in BACKENDS:
            allowed = backend in (choice["backend"], *choice["also"])
            with nullcontext() if allowed else pytest.raises(RuntimeError, match=backend):
                triton_optim.AdamW([p], backend=backend)


def test_without_triton_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(where: str) -> dict[str, Any]:
        raise AssertionError(where)

    monkeypatch.setattr(doctor, "check_launch", never)
    assert doctor.diagnosis(this_machine()._replace(triton=False))["triton_launches"] == []


@needs_triton
def test_results_are_compared_with_eager(device: torch.device) -> None:
    ours, theirs = (launch_check.parameters(device.type) for _ in range(2))
    for params, backend in ((ours, "triton"), (theirs, "eager")):
        optimizer = triton_optim.AdamW(params, lr=0.5, backend=backend)
        for seed in (1, 2):
            launch_check.step(optimizer, seed)
    found, expected = ([p.detach() for p in params] for params in (ours, theirs))
    launch_check.check_results(found, expected)
    for start, p in zip(launch_check.parameters(device.type), found, strict=True):
        with pytest.raises(ValueError, match="from eager's"):  # as if a step had not reached it
            launch_check.check_results([start.detach()], [p])
