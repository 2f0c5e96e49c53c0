"""Models, peers, measuring and the command of `triton-optim bench`. Nothing here depends on how long anything takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_optim
from triton_optim.bench import comparison, models, peers, picture
from triton_optim.bench.agreement import Contender, differences
from triton_optim.bench.comparison import Comparison
from triton_optim.bench.measure import Measurement, Patience, Side, measure
from triton_optim.bench.records import Record, with_others, write_file
from triton_optim.cli import main

needs_rich = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("rich", "matplotlib")), reason='needs the extra: pip install -e ".[bench]"'
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of one pass."""
    monkeypatch.setattr("triton_optim.bench.measure.ROUND_SECONDS", 0.0)
    monkeypatch.setattr("triton_optim.bench.measure.WAIT_SECONDS", 0.0)


# Parameters and tensors, as published or as counted in the implementations that the docstrings name.
COUNTS = {
    "resnet50": (25_557_032, 161),
    "vit_b16": (86_567_656, 152),
    "gpt2": (124_439_808, 148),
    "llama3_1b": (1_235_814_400, 146),
    "llama3_8b": (8_030_261_248, 291),
    "sd15_unet": (859_520_964, 686),
    "moe_many_experts": (6_919_161_856, 3_219),
    "1000x1k": (1_000_000, 1_000),
    "10000x64": (640_000, 10_000),
    "64M16": (1 << 26, 16),
}


@pytest.mark.parametrize("name", models.NAMED)
def test_a_models_parameters_are_those_published(name: str) -> None:
    shapes = models.shapes(name)
    assert (models.elements(shapes), len(shapes)) == COUNTS[name]


@pytest.mark.parametrize("name", ["resnet51", "0x3", "3x", "x3", "3x3G"])
def test_an_unknown_model_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is none. Choose from resnet50, .* COUNTxSIZE"):
        models.shapes(name)


# Measuring: rounds are what their samples say, whatever the machine does.


def test_a_ratio_is_of_medians_and_its_range_of_rounds() -> None:
    m = Measurement([{"ours": [1.0, 2.0], "peer": [4.0]}, {"ours": [3.0], "peer": [2.0, 4.0]}])
    assert m.ratio("ours", "peer") == 2 / 4
    assert m.ratio_range("ours", "peer") == (1.5 / 4, 1.0)
    figures, words = m.compared("ours", ["peer"])
    assert figures["ratio"] == 0.5
    assert words == "0.500 x peer (0.375 to 1.000 by round)"


def test_a_disturbed_round_is_repeated_until_patience_ends() -> None:
    m, busy = Measurement(), 100.0
    assert not m.take({"ours": [9.0]}, busy, Patience(60))
    assert m.take({"ours": [1.0]}, 0.0, Patience(60))
    assert m.take({"ours": [2.0]}, busy, Patience(0))
    assert (m.samples("ours"), m.repeated, m.disturbed) == ([1.0, 2.0], 1, 1)
    assert "1 DISTURBED" in m.quality()


def test_sides_take_turns(quick: None) -> None:
    turns: list[str] = []
    sides = [Side(name, lambda name=name: turns.append(name)) for name in "abc"]  # type: ignore[misc]
    rounds: list[int] = []
    m = measure(sides, patience=0, rounds=2, warm_up=1, advance=lambda: rounds.append(1))
    assert [set(turns[i : i + 3]) for i in range(0, len(turns), 3)] == [set("abc")] * (1 + 2)
    assert [len(m.samples(name)) for name in "abc"] == [2, 2, 2]
    assert len(rounds) == 2


# Agreement.


def contender(name: str, make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, **options: Any) -> Contender:
    params = list(models.parameters([(3, 7), (5000,), (0,), ()], dtype=dtype))
    optimizer = make(params, **options)
    return Contender(name, optimizer, params, optimizer.step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_arithmetic_agrees(dtype: torch.dtype) -> None:
    options = {"lr": 0.1, "weight_decay": 0.1}
    ours = contender("ours", triton_optim.AdamW, dtype, backend="eager", **options)
    torchs = contender("torch", torch.optim.AdamW, dtype, **options)
    (found,) = differences([ours, torchs]).values()
    assert found.same


# What bfloat16 still shows, and what float32 does.
WRONG = [{"lr": 0.11}, {"betas": (0.5, 0.999)}, {"weight_decay": 0.0}, {"eps": 0.1}]
WRONG_IN_FLOAT32 = [{"lr": 0.1001}, {"betas": (0.9, 0.9995)}, {"weight_decay": 0.0999}, {"eps": 1e-4}]


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [*((wrong, torch.bfloat16) for wrong in WRONG), *((wrong, torch.float32) for wrong in WRONG_IN_FLOAT32)],
    ids=str,
)
def test_a_wrong_hyperparameter_does_not(wrong: dict[str, Any], dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    ours = contender("ours", triton_optim.AdamW, dtype, backend="eager", **options)
    torchs = contender("torch", torch.optim.AdamW, dtype, **options | wrong)
    (found,) = differences([ours, torchs]).values()
    assert not found.same
    assert "results disagree" in found.reason()


def test_nan_agrees_with_nothing_and_a_step_that_fails_says_why() -> None:
    ours, bad, broken = (contender(name, torch.optim.SGD, torch.float32, lr=0.1) for name in ("ours", "bad", "broken"))
    with torch.no_grad():
        bad.params[1][17] = float("nan")

    def fail() -> None:
        raise NotImplementedError("needs another machine")

    found = differences([ours, bad, replace(broken, step=fail)])
    assert not found["bad"].same
    assert found["broken"].reason() == "its step failed: needs another machine"


# Peers.


def test_a_peer_may_have_it_under_another_name_and_train_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.optim.SGD, "train", lambda self: seen.append(self), raising=False)
    monkeypatch.setattr(torch.optim.SGD, "consume_grad", True, raising=False)
    classes = {"Signum": ("SGD", {"momentum": 0.5})}
    monkeypatch.setitem(peers.PEERS, "other", peers.Peer("torch", "torch.optim", classes=classes))
    optimizer, _ = peers.peer_optimizer("other", "Signum", [torch.zeros(1)], {"lr": 0.1, "momentum": 0.9})
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert seen == [optimizer]
    assert not optimizer.consume_grad
    with pytest.raises(peers.Unavailable, match=r"torch.optim has no Lion"):
        peers.peer_optimizer("other", "Lion", [torch.zeros(1)], {})


def test_a_missing_peer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer("absent-optim", "absent_optim"))
    with pytest.raises(peers.Unavailable, match="not installed: pip install absent-optim"):
        peers.peer_optimizer("absent", "AdamW", [], {})


def test_a_peer_takes_what_it_knows_and_says_what_it_lacks() -> None:
    def make(params: Any, lr: float) -> None: ...

    assert peers.accepted(make, {"lr": 1.0, "amsgrad": False}, {"foreach": False}) == {"lr": 1.0}
    with pytest.raises(peers.Unavailable, match="make takes no fused"):
        peers.accepted(make, {"lr": 1.0}, {"fused": True})


@pytest.mark.parametrize("name", ["torch-fused", "torch-foreach", "torch-for-loop"])
def test_torchs_own_have_an_adamw_and_no_lion(name: str) -> None:
    params = list(models.parameters([(3,)]))
    optimizer, _ = peers.peer_optimizer(name, "AdamW", params, {"lr": 0.1})
    assert isinstance(optimizer, torch.optim.AdamW)
    with pytest.raises(peers.Unavailable, match=r"torch.optim has no Lion"):
        peers.peer_optimizer(name, "Lion", params, {"lr": 0.1})


# The command, on models so small that only its own work takes time.

OWN = """
import torch

def make_model():
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 10), torch.nn.Linear(30, 40))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    return model

def three():
    return 3

class Wrong(torch.optim.AdamW):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=1.1 * lr, weight_decay=weight_decay)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a user's module."""
    (tmp_path / "bench_own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "bench_own", raising=False)
    return tmp_path


def bench(*options: str) -> int:
    return main(["bench", "--backend", "eager", "--rounds", "1", "--patience", "0", "--device", "cpu", *options])


@needs_rich
def test_a_ratio_a_reason_and_every_sample(
    quick: None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer("absent-optim", "absent_optim"))
    code = bench("--optimizer", "adamw,lion", "--model", "3x5", "--against", "torch-foreach,absent", "--json", "a.json")
    assert code == 0
    out = capsys.readouterr().out
    assert "AdamW, 3x5 (3 tensors)" in out
    assert "ours (eager)" in out
    assert "absent: not installed: pip install absent-optim" in out
    assert "torch-foreach: torch.optim has no Lion" in out
    found = json.loads((folder / "a.json").read_text())
    adamw, lion = found["records"]
    assert {"machine", "versions", "command", "date", "source"} <= found.keys()
    assert found["interrupted"] is False
    assert set(adamw["measurement"]["rounds"][0]) == {"ours", "torch-foreach"}
    assert adamw["figures"]["ours over torch-foreach"]["ratio"] > 0
    assert adamw["figures"]["ours bytes of state a parameter"] >= 8
    assert lion["figures"]["absent"]["torch-foreach"] == "torch.optim has no Lion"


@needs_rich
def test_no_ratio_where_results_disagree(quick: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--optimizer", "adamw", "--model", "bench_own:make_model", "--json", "a.json")
    assert bench(*options, "--against", "bench_own:Wrong,torch-fused") == 1
    out = capsys.readouterr().out
    assert "AdamW, bench_own:make_model (4 tensors)" in out  # a tied weight counts once, one is not trained
    assert "bench_own:Wrong: results disagree: they differ by " in out
    (record,) = json.loads((folder / "a.json").read_text())["records"]
    assert "ours over bench_own:Wrong" not in record["figures"]
    assert set(record["measurement"]["rounds"][0]) == {"ours", "torch-fused"}


@needs_rich
def test_an_interrupted_run_leaves_what_was_finished(
    quick: None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Comparison] = []

    def compare(*args: Any, **options: Any) -> Comparison:
        if done:
            raise KeyboardInterrupt
        done.append(comparison.compare(*args, **options))
        return done[0]

    monkeypatch.setattr("triton_optim.cli.bench.compare", compare)
    options = ("--optimizer", "adamw,lion", "--model", "3x5", "--against", "torch-fused", "--json", "a.json")
    assert bench(*options, "--plot", "a.svg") == 130
    assert "1 of 2 cases were finished" in capsys.readouterr().out
    found = json.loads((folder / "a.json").read_text())
    assert [record["case"] for record in found["records"]] == ["AdamW, 3x5 (3 tensors)"]
    assert found["interrupted"] is True
    assert picture.digest(picture.times_of(done), "Time of optimizer.step()") in (folder / "a.svg").read_text()
    assert {path.name for path in folder.iterdir()} >= {"a.json", "a.svg", "bench_own.py"}


@needs_rich
def test_what_cases_share_stands_in_the_pictures_title_once() -> None:
    times = {"AdamW, gpt2, int8": {"ours": 0.5, "torch-fused": 1.0}, "Lion, gpt2, int8, bfloat16": {"ours": 250.0}}
    (axes,) = picture.bars(times, "A step").axes
    assert axes.get_title() == "A step\ngpt2, int8"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AdamW", "Lion\nbfloat16"]
    assert [text.get_text() for text in axes.texts] == ["ours: 500 us", "torch-fused: 1 ms, 2.00 x", "ours: 250 ms"]


@needs_rich
def test_what_does_not_fit_is_cut_down_or_refused(
    quick: None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton_optim.cli.bench.free_bytes", lambda device: 1 << 16)
    assert bench("--optimizer", "adamw", "--model", "100x40", "--against", "torch-fused") == 0
    assert "100x40 is cut down to 27 of its 100 tensors, 1,080 parameters: " in capsys.readouterr().out
    assert bench("--optimizer", "adamw", "--model", "bench_own:make_model") == 1
    message = capsys.readouterr().err
    assert "bench_own:make_model of 1,680 float32 parameters needs" in message
    assert "What fits: 655 parameters, or 1,092 with one peer" in message
    assert bench("--optimizer", "adamw", "--model", "2x2k") == 1
    assert "What fits" in capsys.readouterr().err


BAD = {
    "--optimizer adamv": "--optimizer adamv: there is none. Choose from adopt, ",
    "--model resnet": "model 'resnet': there is none. Choose from resnet50, ",
    "--model bench_own:nothing": "bench_own has no function or class 'nothing'. It has Wrong, make_model, three",
    "--model bench_own:three": "--model bench_own:three returned int. Return a torch.nn.Module",
    "--model bench_nowhere:make": "importing 'bench_nowhere' raised ModuleNotFoundError",
    "--dtype float8": "--dtype float8: there is none. Choose from float32, ",
    "--backend cuda": "--backend cuda: there is none. Choose from auto, ",
    "--against fused": "--against fused: there is none. Choose from torch-fused, ",
    "--optimizer bench_own:Wrong": "--optimizer bench_own:Wrong is no subclass of triton_optim.RuleOptimizer",
    "--device cuda:99": "--device cuda:99 cannot be used",
    "--rounds 0": "--rounds 0 measures nothing",
    "--patience -1": "--patience -1.0 is no time",
    "--json nowhere/a.json": "the folder nowhere does not exist",
    "--plot a.txt": "the suffix names no image format",
}


@needs_rich
@pytest.mark.parametrize(("options", "message"), BAD.items())
def test_bad_options(options: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options.split()]) == 1
    assert message in capsys.readouterr().err


@needs_rich
def test_ours_that_cannot_run_is_a_reason(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--optimizer", "sparseadam,muon", "--model", "3x5", "--against", "torch-fused") == 0
    out = capsys.readouterr().out
    assert "SparseAdam, 3x5 (3 tensors): not measured: " in out
    assert "Muon, 3x5 (3 tensors): not measured: " in out


def test_cases_measured_anew_stand_among_those_of_before(tmp_path: Path) -> None:
    path, device = tmp_path / "results" / "speed.json", torch.device("cpu")

    def run(day: str, *cases: str) -> dict[str, Any]:
        records, earlier = with_others(path, [Record("speed", case, day, {}, 1.0, 2.0) for case in cases])
        write_file(path, "speed", records, device, date=day, source=day, **earlier)
        return json.loads(path.read_text())

    assert "earlier" not in run("monday", "a", "b", "c")
    run("tuesday", "b")
    found = run("friday", "c", "d")
    assert [(one["case"], one["text"]) for one in found["records"]] == [
        ("a", "monday"), ("b", "tuesday"), ("c", "friday"), ("d", "friday"),
    ]  # fmt: skip
    assert all(one["met"] for one in found["records"])
    assert {case: one["date"] for case, one in found["earlier"].items()} == {"a": "monday", "b": "tuesday"}


def test_benchmarks_run() -> None:
    """All of them are imported; that which times nothing is run."""
    folder = Path(__file__).parents[1] / "benchmarks"
    command = [sys.executable, "-m", "pytest", str(folder), "-k", "launches", "-n", "0", "-q", "--benchmark-disable"]
    # It is no worker of this session.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launches: AdamW, resnet50 (161 tensors), 2 groups, 1 misaligned: 2 launches a step" in done.stdout
