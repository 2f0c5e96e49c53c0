"""`triton-optim demo`: one short run as a user starts it, and every way in which it says no."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from triton_optim.cli import demo

needs_extras = pytest.mark.skipif(
    any(find_spec(module) is None for module in demo.EXTRAS), reason='needs the demo extra: pip install -e ".[demo]"'
)


class Run(NamedTuple):
    code: int
    out: str
    record: dict[str, Any]
    plot: Path


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """10 epochs, which reach 98 %, piped, with the JSON and the plot."""
    folder = tmp_path_factory.mktemp("demo")
    plot, record = folder / "curves.png", folder / "demo.json"
    options = ["--epochs", "10", "--plot", str(plot), "--json", str(record)]
    finished = subprocess.run(
        [sys.executable, "-m", "triton_optim", "demo", *options],
        env={key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FORCE_COLOR")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Run(finished.returncode, finished.stdout, json.loads(record.read_text()), plot)


@needs_extras
def test_output_has_no_control_characters_and_fits_100_columns(short_run: Run) -> None:
    assert not [c for c in short_run.out if ord(c) < 32 and c != "\n"]
    others = [str(short_run.plot.parent), *short_run.record["explain"]["text"].splitlines()]  # as wide as it is
    ours = [line for line in short_run.out.splitlines() if not any(other in line for other in others)]
    assert max(len(line.rstrip()) for line in ours) <= 100
    for expected in ("torch.optim.AdamW(fused=True)", "torch.optim.AdamW(foreach=False)", "loss differs by", "PASSED"):
        assert expected in short_run.out


@needs_extras
def test_trainings_agree(short_run: Run) -> None:
    trainings = short_run.record["trainings"]
    assert set(trainings) == {"torch", "ours", "torch_fused"}
    for training in trainings.values():
        assert training["accuracy"] > 0.97
        assert len(training["losses"]) == 10 * 21
    assert trainings["ours"]["losses"][0] == trainings["torch"]["losses"][0]  # the same weights and batch
    assert short_run.record["largest_loss_difference_from_torch"]["ours"] < 0.05
    assert short_run.record["failures"] == []


@needs_extras
def test_record_says_where_its_numbers_come_from(short_run: Run) -> None:
    record = short_run.record
    assert record["command"].startswith("triton-optim demo --epochs 10 --seed 0 ")
    assert record["date"].endswith("+00:00")
    assert record["versions"]["torch"]
    assert record["versions"]["python"]
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["settings"]["epochs"] == 10
    times = record["step_times"]
    assert set(times["seconds"]) == {"torch_for_loop", "torch_foreach", "torch_fused", "ours"}
    assert set(times["median_seconds"]) == set(times["ratio_to_torch_fused"]) == set(times["seconds"])
    assert times["ratio_to_torch_fused"]["torch_fused"] == 1.0
    assert all(min(seconds) > 0 for seconds in times["seconds"].values())
    assert (times["tensors"], times["elements"]) == (10, 96_426)
    assert record["explain"]["text"] in short_run.out
    assert record["explain"]["backends"]
    assert all(backend in record["explain"]["text"] for backend in record["explain"]["backends"])


@needs_extras
def test_plot_is_an_image(short_run: Run) -> None:
    image = short_run.plot.read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Runs the demo in this process, expects exit code 1 and nothing on stdout; returns the one line."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.run(parser.parse_args(options)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # what Python itself reads as "not there"
    message = refused(capsys)
    assert "scikit-learn: not installed in " in message
    assert message.endswith('pip install -e ".[demo]"\n')


@needs_extras
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--epochs", "0"), "--epochs 0 trains nothing"),
        (("--device", "nonsense"), "--device nonsense cannot be used"),
        (("--device", "meta"), "--device meta cannot be used"),
        (("--plot", "curves.abc"), "--plot curves.abc: the suffix names no image format"),
        (("--json", "no/such/folder/demo.json"), "--json no/such/folder/demo.json: the folder"),
    ],
)
def test_bad_option_is_one_line(options: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *options).startswith(expected)


def a_record(torch: float = 0.98, ours: float = 0.98) -> dict[str, Any]:
    return {"trainings": {"torch": {"accuracy": torch}, "ours": {"accuracy": ours}}, "settings": {"epochs": 6}}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (a_record(), []),
        (a_record(0.985, 0.976), []),
        (a_record(0.97, 0.975), ["torch.optim.AdamW reads 97.00%"]),
        (a_record(0.98, math.nan), ["triton_optim.AdamW reads nan%", "the accuracies differ by nan"]),
        (a_record(0.99, 0.975), ["the accuracies differ by 1.50 percentage points"]),
    ],
)
def test_failures(record: dict[str, Any], expected: list[str]) -> None:
    failures = demo.failures_of(record)
    assert len(failures) == len(expected)
    for failure, start in zip(failures, expected, strict=True):
        assert failure.startswith(start)
