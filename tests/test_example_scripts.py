"""The scripts of examples/ reach what they print, on real data. The figures asserted leave room beyond eight seeds'."""

from __future__ import annotations

import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def load(monkeypatch):
    """load(name): what the script defines. Imports in it find its neighbours, as they do when Python runs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield lambda name, **options: runpy.run_path(str(EXAMPLES / f"{name}.py"), **options)
    sys.modules.pop("data", None)
    torch.set_num_threads(threads)


@pytest.fixture
def run(load):
    """run(name, ...): what the script's main returns."""
    return lambda name, *arguments, **options: load(name)["main"](*arguments, **options)


def test_linear_regression_reaches_least_squares(run):
    best, loss, error = run("linear_regression")
    assert loss == pytest.approx(best, rel=1e-5)
    assert error < 1e-3


def test_cnn_adam_reads_digits(run):
    loss, accuracy = run("cnn_adam")
    assert loss < 0.1
    assert accuracy > 0.94


def test_lstm_rmsprop_reads_digits(run):
    loss, accuracy = run("lstm_rmsprop")
    assert loss < 0.1
    assert accuracy > 0.93


def test_gpt_adamw_knows_more_than_pairs_of_characters(run):
    table, before, after = run("gpt_adamw")
    assert before > 4
    assert after < table - 0.02


def test_parameter_groups_keep_their_own_decay_and_learning_rate(run):
    (accuracy, scale, optimizer), (_, decayed_scale, _) = run("parameter_groups")
    assert accuracy > 0.95
    assert decayed_scale < scale - 0.2
    matrices, vectors = optimizer.param_groups
    assert vectors["lr"] == pytest.approx(2 * matrices["lr"])
    assert vectors["lr"] < 2e-3  # the schedule moved both
    assert (len(matrices["params"]), len(vectors["params"])) == (2, 4)


def test_lbfgs_closure_finds_scikit_learns_answer(run):
    exact, loss, expected, accuracy, calls = run("lbfgs_closure")
    assert loss == pytest.approx(exact, rel=1e-6)
    assert accuracy == pytest.approx(expected, abs=0.005)
    assert accuracy > 0.95
    assert calls < 150


def test_plot_schedule_plots_the_schedule(run, tmp_path):
    learning_rates, losses = run("plot_schedule", tmp_path / "plot.png", warmup=40)
    assert learning_rates[40] == max(learning_rates) == 1e-2
    assert all(before < after for before, after in pairwise(learning_rates[:41]))
    assert all(before > after for before, after in pairwise(learning_rates[40:]))
    assert learning_rates[-1] < 1e-5
    assert sum(losses[-20:]) / 20 < 0.15
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_compare_trains_nine_times(run, tmp_path):
    reached = run("compare", tmp_path / "plot.png")
    assert len(reached) == 9
    for losses, accuracy in reached.values():
        assert losses[-1] < 0.2
        assert accuracy > 0.92
    assert len({losses[-1] for losses, _ in reached.values()}) == 9  # every schedule was followed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_tune_optuna_finds_better_than_the_defaults(run):
    optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install optuna")
    study, before, after = run("tune_optuna", trials=12)
    states = [trial.state for trial in study.trials]
    assert len(states) == 12
    assert optuna.trial.TrialState.PRUNED in states
    assert study.trials[0].params == {"lr": 1e-3, "weight_decay": 1e-2}
    assert study.best_value < 0.5 * study.trials[0].value
    assert after > before + 0.05


def test_mnist_is_read_better_than_by_the_nearest_mean(load):
    script = load("mnist")
    try:
        nearest_mean, network = script["main"]("data")
    except script["MissingError"] as missing:
        pytest.skip(str(missing))
    assert nearest_mean < network


def test_mnist_says_what_is_missing_and_ends_well(load, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # not installed, even where it is
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        load("mnist", run_name="__main__")
    assert end.value.code is None
    assert capsys.readouterr().out.startswith("Skipped: torchvision cannot be imported (")


def test_command_line_says_where_the_plot_goes(load, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["plot_schedule.py", "--out", str(tmp_path / "plot.svg")])
    load("plot_schedule", run_name="__main__")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_own_nesterov_is_torchs(run):
    own, torchs, apart = run("own_nesterov")
    assert min(own, torchs) > 0.92
    assert apart < 5e-6


def test_tour_runs_from_top_to_bottom(load, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.delitem(sys.modules, "own_nesterov", raising=False)
    found = {"__name__": "__main__"}
    for cell in json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), found)
    matplotlib.pyplot.close("all")
    assert found["ours"] == pytest.approx(found["torchs"], abs=1e-6)
    assert min(found["read"].values()) > 0.8
    assert min(found["grid"].values()) > 0.85
    assert len(found["grid"]) == 9
    assert found["apart"] < 5e-6
    assert min(found["plain"], found["averaged"]) > 0.85
    assert found["seconds"] < 300
    assert "velocity int8" in capsys.readouterr().out


def test_every_script_is_tested_and_in_the_table():
    tested_elsewhere = {"own_optimizer", "compiled_step", "race_own"}  # test_examples.py, test_race_tasks.py
    tests = Path(__file__).read_text()
    table = (EXAMPLES / "README.md").read_text()
    for script in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        assert f"`{script.name}`" in table
        assert script.stem in tested_elsewhere | {"data", "tour"} or f'("{script.stem}"' in tests
