"""What takes part in a race, and the tasks, settings and searches that there are."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from races import SGD, Count, needs_extras
from races import folder as folder

from triton_optim.race import RaceError, Results, Task, race
from triton_optim.race.contestants import contestant, everyone
from triton_optim.race.quadratic_deep import BASELINES, PUBLISHED, problem
from triton_optim.race.settings import ALGOPERF, LLM, SETTINGS, SMALL
from triton_optim.registry import optimizers


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
