"""The experimenter's bench: who wins where the answer is known, that no run is made twice, and every way it says no."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from triton_optim import cli
from triton_optim.race import RaceError, Results, Task, Watcher, race
from triton_optim.race.contestants import contestant, everyone
from triton_optim.race.quadratic_deep import BASELINES, PUBLISHED, problem
from triton_optim.race.settings import ALGOPERF, LLM, SETTINGS, SMALL
from triton_optim.registry import optimizers
from triton_optim.util.extras import DISTRIBUTIONS
from triton_optim.util.files import write_whole

needs_extras = pytest.mark.skipif(
    any(find_spec(module) is None for module in DISTRIBUTIONS),
    reason='needs the race extra: pip install -e ".[race]"',
)
SGD = "torch.optim:SGD"

# A user's own module: half of the squared distance from 3, which a step of SGD with lr 1 makes 0; above 2 it diverges.
OWN = '''
import torch
from torch.optim.lr_scheduler import ExponentialLR
from triton_optim.race import Task


class Distance(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.randn(4))


def bowl(seed):
    return Task(Distance(), [None], lambda model, _: (model.x - 3).square().sum() / 2, [None], steps=10, threads=1)


def slow(seed):
    import time
    def loss(model, batch):
        time.sleep(0.01)
        return (model.x - 3).square().sum() / 2
    return Task(Distance(), [None], loss, [None], steps=10, threads=1)


class Half(torch.optim.Optimizer):
    """Steps of half of the way that is asked for, without a closure."""

    def __init__(self, params, lr, part=0.5):
        super().__init__(params, {"lr": lr, "part": part})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["part"] * group["lr"] * p.grad


def falling(optimizer, steps):
    return ExponentialLR(optimizer, 0.5)


def not_a_task(seed):
    return 3


def broken(seed):
    raise ValueError('no data')
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with the user's module in it."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


class Count(Watcher):
    """Which runs were made, and which were there already."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.kept: list[str] = []

    def ended(self, run, record, again):
        (self.kept if again else self.made).append(str(run))


def test_the_right_learning_rate_wins() -> None:
    results = race("own:bowl", [SGD, "own:Half"], ["constant"], [0.01, 1.0], seeds=2)
    first, second = results.standings
    assert (first.optimizer, first.lr, first.best, first.spread) == (SGD, 1.0, 0.0, 0.0)
    assert (second.optimizer, second.lr) == ("own:Half", 1.0)
    # A step halves the distance, whose square is the loss: after ten steps 4^-10 is left of each start.
    starts = [record.validation[0] for record in results.records if record.optimizer == "own:Half" and record.lr == 1]
    assert second.best == pytest.approx(sum(starts) / 2 * 4**-10, rel=1e-3)
    assert second.spread == pytest.approx(abs(starts[0] - starts[1]) / math.sqrt(2) * 4**-10, rel=1e-3)
    # All who learn reach the target: the worse of the two lowest mean losses, Half's, in its last step.
    assert results.target == pytest.approx(second.best)
    assert (first.steps_to_target, second.steps_to_target) == (1, 10)
    assert first.edge == second.edge == "largest"
    assert "try beyond it" in repr(results)


def test_a_target_of_ones_own() -> None:
    (standing,) = race("own:bowl", ["own:Half"], ["constant"], [1.0], seeds=1, target=1e9).standings
    assert (standing.steps_to_target, standing.seconds_to_target) == (0, 0.0)
    (standing,) = race("own:bowl", ["own:Half"], ["constant"], [1.0], seeds=1, target=-1.0).standings
    assert (standing.steps_to_target, standing.seconds_to_target) == (None, None)


def test_divergence_is_recorded_and_not_fatal() -> None:
    results = race("own:bowl", [SGD, "own:Half"], ["constant"], [30.0, 1.0], seeds=1, steps=40)
    diverged = [record for record in results.records if record.status == "diverged"]
    assert [(record.optimizer, record.lr) for record in diverged] == [(SGD, 30.0), ("own:Half", 30.0)]
    assert all(math.isfinite(loss) for record in diverged for loss in record.losses + record.validation)
    assert 0 < diverged[0].steps < 40
    assert [standing.lr for standing in results.standings] == [1.0, 1.0]
    assert "1 of 2 runs diverged" in repr(results)


def test_all_diverged() -> None:
    results = race("own:bowl", [SGD], ["constant"], [30.0], seeds=1, steps=40)
    assert results.standings[0].best is None
    assert results.target is None
    assert "try a smaller lr" in repr(results)
    json.dumps(results.as_dict(), allow_nan=False)


def noisy(seed: int) -> Task:
    """A network with dropout and a loader that shuffles: both draw from torch's generator."""
    x = torch.randn(64, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True)

    def loss(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    return Task(model, loader, loss, [(x, x.sum(1, keepdim=True))], steps=20, threads=1)


def careless(params, lr):
    """AdamW by somebody who draws random numbers meanwhile."""

    class Careless(torch.optim.AdamW):
        def step(self, closure=None):
            torch.rand(7)
            return super().step(closure)

    return Careless(params, lr=lr)


def test_a_seed_gives_all_the_same_weights_and_batches() -> None:
    before = torch.get_rng_state()
    results = race(noisy, ["torch.optim:AdamW", careless, SGD], ["constant"], [1e-3], seeds=2)
    assert torch.equal(torch.get_rng_state(), before)
    plain, other, sgd = (
        [r for r in results.records if r.optimizer == s] for s in ("torch.optim:AdamW", "careless", SGD)
    )
    assert [r.losses for r in plain] == [r.losses for r in other]
    assert [r.validation[0] for r in plain] == [r.validation[0] for r in sgd]
    assert plain[0].losses[0] != plain[1].losses[0]
    assert plain[0].losses[1] != sgd[0].losses[1]
    assert len(set(plain[0].losses)) == 20  # 8 batches, begun again; no two alike under dropout
    assert results.uneven_starts == []


def test_randomness_beyond_the_seed_is_told() -> None:
    starts = iter(range(100))

    def task(seed: int) -> Task:
        model = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(model.weight, next(starts))
        return Task(model, [None], lambda model, _: model(torch.ones(1)).square().sum(), [None], steps=2)

    assert race(task, [SGD], ["constant"], [1e-3, 1e-2], seeds=1).uneven_starts == [0]


def test_no_run_is_made_twice(folder: Path) -> None:
    def again(**changed) -> Count:
        count = Count()
        options = {"task": "own:bowl", "optimizers": [SGD], "schedules": ["constant"], "lrs": [0.1, 1.0], "seeds": 2}
        race(**{**options, **changed}, out="kept", watcher=count)
        return count

    assert (len((first := again()).made), first.kept) == (4, [])
    assert again().made == []
    assert len(again(seeds=3).made) == 2
    assert again(lrs=[1.0]).made == []
    for changed in ({"steps": 11}, {"task": "own:slow"}, {"schedules": ["cosine"]}, {"options": {"momentum": 0.5}}):
        assert len((count := again(**changed)).made) == 4, changed
        assert count.kept == []
    own = folder / "own.py"
    own.write_text(own.read_text().replace("- 3", "- 4"))
    del sys.modules["own"]
    assert len(again().made) == 4
    for path in (folder / "kept" / "runs").iterdir():
        assert path.suffix == ".json"
        assert json.loads(path.read_text())["record"]["status"] == "finished"


def test_a_record_is_written_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "record.json"
    write_whole(path, "before")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert sorted(p.name for p in folder.iterdir()) == ["own.py", "record.json"]


def test_a_damaged_record_is_named(folder: Path) -> None:
    race("own:bowl", [SGD], ["constant"], [1.0], seeds=1, out="kept")
    (path,) = (folder / "kept" / "runs").iterdir()
    path.write_text("{")
    with pytest.raises(RaceError, match=f"{path.name} holds no record of a run .* Delete it"):
        race("own:bowl", [SGD], ["constant"], [1.0], seeds=1, out="kept")


def test_schedules_move_the_learning_rate() -> None:
    schedules = ["constant", "linear", "cosine", "warmup", "warmup_linear", "warmup_cosine", "onecycle", "own:falling"]
    results = race("own:bowl", ["torch.optim:Adam"], schedules, [0.1], seeds=1, steps=20)
    lrs = {record.schedule: record.lrs for record in results.records}
    assert list(lrs) == schedules
    assert set(lrs["constant"]) == {0.1}
    assert lrs["linear"] == pytest.approx([0.1 * (1 - i / 20) for i in range(20)])
    assert lrs["cosine"] == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 20)) for i in range(20)])
    assert lrs["warmup"][:4] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    assert lrs["warmup_cosine"][2] == pytest.approx(0.1)
    assert lrs["warmup_cosine"][-1] < 0.01
    assert lrs["onecycle"][0] == pytest.approx(0.1 / 25)
    assert max(lrs["onecycle"]) == pytest.approx(0.1)
    assert lrs["own:falling"][:3] == pytest.approx([0.1, 0.05, 0.025])


def test_every_exported_optimizer_takes_part() -> None:
    def task(seed: int) -> Task:
        x = torch.randn(32, 4)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        own = {"steps": 15, "heads": ["1"], "threads": 1, "lrs": SMALL}
        return Task(model, [x], lambda model, x: model(x).square().mean(), [x], **own)

    assert {"adamw", "lion", "muon", "adafactor", "lbfgs", "nonlinearcg", "sparseadam"} <= set(optimizers())
    eager = {} if torch.cuda.is_available() else {"backend": "eager"}
    closures = ["lbfgs", "nonlinearcg"]
    ruled = race(task, ["all"], ["onecycle"], seeds=1, options=eager)
    assert {s.optimizer for s in ruled.standings} == optimizers().keys() - {*closures, "sparseadam"} == {*everyone()}
    driven = race(task, closures, ["onecycle"], seeds=1)
    for standing in (*ruled.standings, *driven.standings):
        start = next(r.validation[0] for r in ruled.records)
        assert standing.best is not None, standing
        # In 15 steps some do not come far from the rates that they begin with.
        share = 0.9 if standing.optimizer in (*SMALL, *closures) else 1.0
        assert standing.best < share * start, standing
    with pytest.raises(
        RaceError, match=r"sparseadam with the schedule constant cannot take a step on .*dense gradients"
    ):
        race(task, ["sparseadam"], ["constant"], seeds=1)


def test_muons_groups_and_bytes() -> None:
    def task(seed: int) -> Task:
        x = torch.randn(32, 64)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        return Task(model, [x], lambda model, x: model(x).square().mean(), [x], steps=4, heads=["1"], threads=1)

    contestants = ["muon(backend=eager)", "adamw(backend=eager)", "adamw(backend=eager,state_dtype=int8)", SGD]
    results = race(task, contestants, ["constant"], [1e-3], seeds=1)
    kept = {record.optimizer: record.state_bytes for record in results.records}
    rest = 64 + 64 * 2 + 2  # bias and head
    assert kept["muon(backend=eager)"] == 4 * 64 * 64 + rest * 8 + 3 * 4  # momentum; two moments; step counts
    assert kept["adamw(backend=eager)"] == (64 * 64 + rest) * 8 + 4 * 4
    # One byte a value, a float32 for each 256; less than 4,096 values are kept as float32.
    assert kept["adamw(backend=eager, state_dtype=int8)"] == 2 * (64 * 64 + 16 * 4) + rest * 8 + 4 * 4
    assert kept[SGD] == 0
    assert {record.parameters for record in results.records} == {64 * 64 + rest}


def test_options_in_names_and_for_all() -> None:
    results = race("own:bowl", ["own:Half(part=1.0)", "own:Half(lr=(0.1,0.2))"], ["constant"], [1.0], seeds=1)
    assert [(r.optimizer, r.lr) for r in results.records] == [
        ("own:Half(part=1.0)", 1.0),
        ("own:Half", 0.1),
        ("own:Half", 0.2),
    ]
    assert results.standings[0].best == 0.0
    assert race("own:bowl", ["own:Half"], ["constant"], [1.0], seeds=1, options={"part": 1.0}).standings[0].best == 0.0
    assert len(race("own:bowl", ["own:Half"], ["constant"], seeds=1).records) == 3  # around 1e-3, which is nobody's


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"optimizers": ["adamx"]}, "There is no optimizer 'adamx'. Choose from .*adadelta, .*adamw.*, or name"),
        ({"task": "digit"}, "There is no task 'digit'. Choose from charlm, digits, quadratic_deep, or"),
        ({"schedules": ["cosin"]}, "There is no schedule 'cosin'. Choose from constant, cosine"),
        ({"task": "nowhere:task"}, "importing 'nowhere' raised ModuleNotFoundError.* looked for in /"),
        ({"optimizers": ["own:Hlaf"]}, "own has no function or class 'Hlaf'. It has Distance, .*Half"),
        ({"task": "own:not_a_task"}, "The task 'own:not_a_task' gave int for seed 0. Return a triton_optim.race.Task"),
        (
            {"task": "own:broken"},
            r"'own:broken' cannot be made: it raised ValueError: no data .*own.py:\d+. for seed 0",
        ),
        ({"optimizers": []}, "A race without optimizers has no runs"),
        ({"optimizers": [SGD, SGD]}, "torch.optim:SGD stands twice among the optimizers"),
        ({"optimizers": [f"{SGD}(0.9)"]}, "The options of 'torch.optim:SGD.0.9.' cannot be read"),
        ({"optimizers": [f"{SGD}(lr=-1)"]}, "The learning rate -1 of .* is no number above 0"),
        ({"optimizers": [f"{SGD}(colour=3)"]}, "cannot take a step on own:bowl: TypeError.*colour"),
        ({"seeds": 0}, "0 seeds are too few. Give 1 or more"),
        ({"steps": 1}, "1 steps are too few. Give 2 or more"),
        ({"device": "nonsense"}, "The device nonsense cannot be used"),
        ({"storage": "sqlite:///x.db"}, "The storage sqlite:///x.db is for trials, and there are none"),
        ({"out": "own.py"}, "cannot be kept in own.py: it is a file"),
    ],
)
def test_what_cannot_be_raced_is_one_line(changed: dict[str, object], expected: str) -> None:
    options = {"task": "own:bowl", "optimizers": [SGD], "schedules": ["constant"], "lrs": [1.0], "seeds": 1}
    with pytest.raises(RaceError, match=expected) as caught:
        race(**{**options, **changed})
    assert "\n" not in str(caught.value)


def test_batches_that_cannot_be_begun_again() -> None:
    def task(seed: int) -> Task:
        model = torch.nn.Linear(1, 1)
        return Task(model, iter([None] * 5), lambda model, _: model(torch.ones(1)).square().sum(), [None], steps=10)

    with pytest.raises(RaceError, match="batches ended after 5, and cannot be begun again"):
        race(task, [SGD], ["constant"], [1e-3], seeds=1)


class Rows(HTMLParser):
    """Of the tables of a page the rows, each of cells as (text, what it is sorted by)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str]]]] = []
        self.kinds: list[str] = []
        self.elsewhere: list[str] = []
        self.key: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.kinds.append(tag)
        self.elsewhere += [x for x in (given.get("src"), given.get("href")) if x and not x.startswith("data:")]
        if tag == "tbody":
            self.tables.append([])
        elif tag == "tr" and "tbody" in self.kinds and self.kinds[-2:-1] != ["thead"]:
            self.tables[-1].append([])
        self.key = given.get("data-by") if tag == "td" else None

    def handle_data(self, data: str) -> None:
        if self.key is not None and data.strip():
            self.tables[-1][-1].append((data, self.key))


def command(folder: Path, *options: str, own: str = "own:bowl") -> list[str]:
    names = ["--task", own, "--optimizers", f"{SGD},own:Half", "--schedules", "constant,cosine"]
    return [*names, "--lrs", "0.1,1.0,30.0", "--seeds", "1", "--out", str(folder / "kept"), *options]


@needs_extras
def test_the_command_leaves_a_table_a_picture_and_valid_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["race", *command(folder, "--json", "all.json", "--set", "colour=red")]) == 1
    assert "unexpected keyword argument 'colour'" in capsys.readouterr().err
    assert cli.main(["race", *command(folder, "--json", "all.json", "--steps", "40")]) == 0
    out = capsys.readouterr().out
    assert not [c for c in out if ord(c) < 32 and c != "\n"]
    assert max(len(line.rstrip()) for line in out.splitlines() if str(folder) not in line) <= 100
    assert "torch.optim:SGD, constant, lr 30, seed 0: diverged" in out
    assert "torch.optim:SGD: 2 of 6 runs diverged" in out
    picture = (folder / "kept" / "race.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 30_000
    page = Rows()
    page.feed((folder / "kept" / "report.html").read_text(encoding="utf-8"))
    standings, runs = page.tables
    assert [row[0] for row in standings] == [(SGD, SGD), ("own:Half", "own:Half")]
    assert len(runs) == 12
    lost = [row for row in runs if row[4][0] == "diverged"]
    assert [row[2] for row in lost] == [("30", "30.0")] * 4
    assert all(cell for row in standings + runs for cell, _ in row)
    assert page.kinds.count("img") == 1
    assert not page.elsewhere  # it needs no other file
    text = (folder / "all.json").read_text()
    everything = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert everything["command"].startswith("triton-optim race --task own:bowl --optimizers torch.optim:SGD,own:Half ")
    assert [standing["optimizer"] for standing in everything["standings"]] == [SGD, "own:Half"]
    assert len(everything["runs"]) == 12
    assert everything["versions"]["torch"]
    assert cli.main(["race", *command(folder, "--steps", "40")]) == 0
    assert capsys.readouterr().out.count("kept from before") == 12


@needs_extras
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--optimizers", "adamx"], "There is no optimizer 'adamx'. Choose from "),
        (["--lrs", "fast"], "--lrs fast: not all of it are numbers"),
        (["--lrs", "0"], "The learning rate 0.0 of '--lrs 0' is no number above 0"),
        (["--plot", "race.abc"], "--plot race.abc: the suffix names no image format"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: the folder no/such does not exist"),
        (["--set", "weight_decay"], "The options of '--set weight_decay' cannot be read"),
        (["--target", "nan"], "--target nan is no loss"),
        (["--tune", "2", "--storage", "nonsense"], "The storage nonsense cannot be used"),
    ],
)
def test_bad_option_is_one_line(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["race", "--task", "own:bowl", "--optimizers", SGD, *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(expected)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("rich", []),
        ("matplotlib", []),
        ("optuna", ["--tune", "3"]),
        ("sklearn", ["--task", "digits"]),
        ("numpy", ["--task", "quadratic_deep"]),
    ],
)
def test_missing_extra_is_named(
    module: str, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triton_optim.race import digits

    digits.data.cache_clear()
    problem.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)  # what Python itself reads as "not there"
    assert cli.main(["race", "--task", "own:bowl", "--optimizers", SGD, *options]) == 1
    message = capsys.readouterr().err
    assert f"{DISTRIBUTIONS[module]}: not installed in " in message
    assert message.endswith('pip install -e ".[race]"\n')


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A Python process in the folder."""
    path = os.pathsep.join([str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe)


@needs_extras
def test_an_interrupted_race_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = started(folder, "-m", "triton_optim", "race", *command(folder, own="own:slow"))
    runs = folder / "kept" / "runs"
    while len(list(runs.glob("*.json"))) < 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130
    assert error == f"Interrupted. The same command goes on from the runs in {folder / 'kept'}.\n"
    files = list(runs.iterdir())
    assert 3 <= len(files) < 12
    assert all(json.loads(path.read_text())["record"]["steps"] == 10 for path in files)
    written = {path: path.stat().st_mtime_ns for path in files}
    assert cli.main(["race", *command(folder, own="own:slow")]) == 0
    assert capsys.readouterr().out.count("kept from before") == len(files)
    assert len(list(runs.iterdir())) == 12
    assert {path: path.stat().st_mtime_ns for path in files} == written


@needs_extras
def test_tuning_finds_the_learning_rate_and_prunes() -> None:
    count = Count()
    options = {"lrs": [1e-4, 10.0], "tune": 15, "seeds": 2, "steps": 20, "out": "kept"}
    results = race("own:bowl", [SGD], ["constant"], **options, watcher=count)
    (standing,) = results.standings
    assert standing.best < 1e-3
    assert 0.3 < standing.lr < 1.7  # a step multiplies the distance by 1 - lr
    assert standing.pruned > 0
    assert len(count.made) == 15 + 1  # the winner's first seed is its trial
    again = Count()
    repeated = race("own:bowl", [SGD], ["constant"], **options, watcher=again)
    assert again.made == []
    assert repeated.as_dict() == results.as_dict()


@needs_extras
def test_tuning_that_is_interrupted_goes_on() -> None:
    class Impatient(Count):
        def ended(self, run, record, again):
            super().ended(run, record, again)
            if len(self.made) == 4:
                raise KeyboardInterrupt

    options = {"lrs": [1e-4, 10.0], "tune": 8, "seeds": 1, "steps": 20, "out": "kept"}
    before, after = Impatient(), Count()
    with pytest.raises(KeyboardInterrupt):
        race("own:bowl", [SGD], ["constant"], **options, watcher=before)
    results = race("own:bowl", [SGD], ["constant"], **options, watcher=after)
    assert len(after.made) == 8 - 3  # the fourth was not told to Optuna, and another takes its place
    assert not set(before.made) & set(after.made)
    assert results.standings[0].best is not None


SHARED = """
import sys
from triton_optim.race import race
results = race("own:slow", ["own:Half"], ["constant"], [0.001, 1.5], tune=8, storage="sqlite:///shared.db", seeds=1,
               out=sys.argv[1])
print(results.standings[0].lr)
"""


@needs_extras
def test_two_processes_share_a_study(folder: Path) -> None:
    import optuna

    processes = [started(folder, "-c", SHARED, name) for name in ("a", "b")]
    found = []
    for process in processes:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        found.append(out)
    assert found[0] == found[1]  # both wait for the other's last trial
    (summary,) = optuna.get_all_study_summaries("sqlite:///shared.db")
    trials = optuna.load_study(study_name=summary.study_name, storage="sqlite:///shared.db").trials
    done = [t for t in trials if t.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)]
    assert len(done) in (8, 9)  # both may begin the last at once
    assert len({t.params["lr"] for t in done}) >= 8
    # A trial is made by one of them; the winner's run may be made again by the other.
    made = [len(list((folder / name / "runs").iterdir())) for name in ("a", "b")]
    assert len(done) <= sum(made) <= len(done) + 1


def test_the_guides_race(folder: Path) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "race.md").read_text()
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "def parity" in block]
    (folder / "guide_race.py").write_text(text)
    results = runpy.run_path("guide_race.py")["results"]
    assert len(results.records) == 12
    assert results.standings[0].best < 0.05  # a coin would have log(2), 0.69


@needs_extras
def test_the_example_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    results = runpy.run_module("race_own", run_name="race_own")["main"]()
    sys.modules.pop("data", None)
    standings = {standing.optimizer: standing for standing in results.standings}
    assert len(results.records) == 2 * 2 * 3 * 2
    assert all(s.best < 0.6 * results.records[0].validation[0] for s in standings.values()), results
    assert standings["adamw"].edge is None


@pytest.mark.parametrize("name", ["contestants", "task"])
def test_the_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"triton_optim.race.{name}")).failed == 0


@needs_extras
def test_digits_learns() -> None:
    (standing,) = race("digits", ["torch.optim:AdamW"], ["cosine"], [3e-3], seeds=1).standings
    assert standing.best < 0.15


def test_charlm_learns() -> None:
    results = race("charlm", ["torch.optim:AdamW"], ["cosine"], [1e-2], seeds=1, steps=40)
    assert results.records[0].validation[0] == pytest.approx(math.log(128), rel=0.05)
    assert results.standings[0].best < 3.2


def bare() -> Task:
    model = torch.nn.Linear(1, 1)
    return Task(model, [None], lambda model, _: model.weight.sum(), [None], lrs={"adamw": 0.5})


@pytest.mark.parametrize("name", SETTINGS)
def test_published_settings_are_taken(name: str) -> None:
    build, setting = optimizers()[name], SETTINGS[name]
    assert "https://" in setting.source
    build([torch.nn.Parameter(torch.zeros(2, 2))], lr=setting.lr, **setting.options)


def test_where_a_search_begins() -> None:
    def begun(given: str, published: bool = False) -> tuple[float, dict[str, object], list[str]]:
        own = contestant(given).starting(bare(), published)
        return own.usual_lr, own.all_options, own.remarks(bare(), [])

    assert begun("adamw") == (0.5, {}, ["lr around 0.5: usual on this task"])
    assert begun("lion") == (1e-3, {}, [f"lr around 0.001: {LLM}"])
    nothing = "the default of its class, as no published setting is known"
    assert begun("own:Half") == (1e-3, {}, [f"lr around 0.001: {nothing}"])
    assert begun("radam", published=True) == (1e-3, {}, [f"lr around 0.001: {nothing}"])
    options = {"betas": (0.9091, 0.9989), "weight_decay": 0.08122}
    said = f"lr around 0.001908, betas=(0.9091, 0.9989), weight_decay=0.08122: {ALGOPERF}"
    assert begun("nadamw", published=True) == (1.908e-3, options, [said])
    assert begun("torch.optim:AdamW", published=True)[:2] == (1e-3, dict(SETTINGS["adamw"].options))
    # What a user says comes first, and is not said again.
    options = {"betas": (0.8, 0.999), "weight_decay": 0.5}
    assert begun("adamw(weight_decay=0.5,lr=0.25)", published=True)[1:] == (options, [f"betas=(0.8, 0.999): {LLM}"])
    assert contestant("adamw(lr=0.25)").starting(bare(), False).remarks(bare(), []) == []
    assert contestant("adamw").starting(bare(), False).remarks(bare(), [0.1]) == []


def test_published_settings_make_other_runs() -> None:
    def made(**changed: bool) -> tuple[Results, Count]:
        count = Count()
        names, lrs = ["sgd(backend=eager)"], [0.1]
        return race("own:bowl", names, ["constant"], lrs, seeds=1, out="kept", watcher=count, **changed), count

    (plain, first), (published, second), (_, third) = made(), made(published=True), made(published=True)
    assert [(len(c.made), len(c.kept)) for c in (first, second, third)] == [(1, 0), (1, 0), (0, 1)]
    assert "momentum=0.9, weight_decay=0.0001: ResNet" in repr(published)
    assert plain.standings[0].best != published.standings[0].best


def test_sophia_is_given_its_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton_optim

    taken: list[int] = []
    estimate = triton_optim.SophiaG.update_hessian

    def counted(self: triton_optim.SophiaG) -> None:
        taken.append(self.param_groups[0]["bs"])
        estimate(self)

    monkeypatch.setattr(triton_optim.SophiaG, "update_hessian", counted)

    def task(seed: int, sampled: bool = True) -> Task:
        x = torch.randn(32, 4)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.Linear(4, 3))

        def loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())

        def drawn(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            logits = model(x)
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            return torch.nn.functional.cross_entropy(logits, labels)

        own = {"sampled_loss": drawn, "samples": 32} if sampled else {}
        return Task(model, [x], loss, [x], steps=15, threads=1, **own)

    names = ["sophiag(backend=eager)", "sgd(backend=eager)"]
    results = race(task, names, ["constant"], [1e-9], seeds=1)
    assert taken == [32] * 3  # two steps that are tried, then steps 0 and 10
    by = {record.optimizer: record for record in results.records}
    sophia, sgd = (by[next(label for label in by if label.startswith(name[:5]))] for name in names)
    assert sophia.losses == pytest.approx(sgd.losses, rel=1e-6)  # the same batches and the same dropout
    assert results.standings[0].remarks == results.standings[1].remarks == []
    taken.clear()
    results = race(lambda seed: task(seed, sampled=False), names[:1], ["constant"], [1e-3], seeds=1)
    assert taken == []
    assert "no Hessian is estimated, as the task has no sampled_loss" in repr(results)


def test_quadratic_deep_is_deepobs() -> None:
    hessian, learned, judging = problem()
    drawn = np.random.RandomState(42)
    eigenvalues = np.sort(np.concatenate((drawn.uniform(0, 1, 90), drawn.uniform(30, 60, 10))))
    np.testing.assert_allclose(np.linalg.eigvalsh(hessian.double().numpy()), eigenvalues, atol=1e-5)
    # What the generator of 2006 draws first from these seeds.
    for points, number in ((learned, 0.4967141530112327), (judging, 0.25739992534469336)):
        assert points[0, 0].item() == np.float32(0.6 * number)
    eager = {"backend": "eager"}
    results = race("quadratic_deep", seeds=2, options=eager)
    # Published, of all runs: 353.44676426478793.
    assert {round(record.validation[0], 4) for record in results.records} == {353.4468}
    assert [record.steps for record in results.records] == [700] * 6
    assert len(results.beside) == 3
    for ours in results.beside:
        # The mean of 2 seeds beside that of 10: within three standard deviations of their difference.
        tolerance = 3 * ours.published.spread * (1 / 2 + 1 / 10) ** 0.5
        assert ours.final == pytest.approx(ours.published.final, abs=tolerance), ours
    text = repr(results)
    assert "last loss" in text
    assert "87.397 ± 0.17" in text
    assert f"published: {BASELINES}" in text
    assert [row["ours"] for row in results.as_dict()["published"]] == [b.final for b in results.beside]
    assert [p.optimizer for p in PUBLISHED] == [b.published.optimizer for b in results.beside]
    # Runs of other lengths are not compared.
    assert race("quadratic_deep", steps=3, seeds=1, options=eager).beside == []
