"""`triton-optim race`: its table, picture and errors; races that are interrupted, tuned, or shared by processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from races import SGD, Count, needs_extras
from races import folder as folder

from triton_optim import cli
from triton_optim.race import race
from triton_optim.race.quadratic_deep import problem
from triton_optim.util.extras import DISTRIBUTIONS


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
    storage = optuna.storages.RDBStorage("sqlite:///shared.db")
    (summary,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    done = [t for t in trials if t.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)]
    assert len(done) in (8, 9)  # both may begin the last at once
    assert len({t.params["lr"] for t in done}) >= 8
    # A trial is made by one of them; the winner's run may be made again by the other.
    made = [len(list((folder / name / "runs").iterdir())) for name in ("a", "b")]
    assert len(done) <= sum(made) <= len(done) + 1
