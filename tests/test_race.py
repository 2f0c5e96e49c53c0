"""The experimenter's bench: who wins where the answer is known, that no run is made twice, and every way it says no."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from races import SGD, Count
from races import folder as folder

from triton_optim.race import RaceError, Task, race
from triton_optim.util.files import write_whole


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
