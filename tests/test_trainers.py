"""docs/trainers runs, each page where its client is installed, and so do our callbacks in it; callbacks and registries
also with small stand-ins for the clients, which CI does not install. Pages of several processes run in
test_two_ranks_wrapped.py.
"""

import copy
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import assert_same_bits, values
from complaints import explains
from torch import Tensor
from trainers import made, stand_in

import triton_optim as to

PAGES = Path(__file__).parents[1] / "docs" / "trainers"
NEEDS = {
    "accelerate": ["accelerate"],
    "configuration": ["jsonargparse", "hydra", "fire"],
    "ddp": [],
    "fsdp2": [],
    "lightning": ["lightning"],
    "peft": ["peft", "transformers"],
    "stable-baselines3": ["stable_baselines3"],
    "timm": ["timm", "torchvision"],
    "torchtitan": ["torchtitan"],
    "transformers": ["transformers", "accelerate"],
}
ALONE = sorted(page for page in NEEDS if page not in ("ddp", "fsdp2"))


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL))


def environment() -> dict[str, str]:
    """As a user has it: without the interpreter, offline."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_every_page_is_run_and_says_what_is_not_supported() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} - {"index", "README"} == {*NEEDS}
    for page in NEEDS:
        text = (PAGES / f"{page}.md").read_text()
        assert code_of(page), page
        assert "## What is not supported" in text, page


@pytest.mark.parametrize("page", ALONE)
def test_a_page_runs(page: str, tmp_path: Path) -> None:
    if missing := [name for name in NEEDS[page] if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'triton-optim[trainers]'")
    (tmp_path / "page.py").write_text(code_of(page))
    command = [sys.executable, "-W", "ignore", "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("client", ["lightning", "transformers"])
def test_callbacks_in_the_client(client: str, tmp_path: Path) -> None:
    if find_spec(client) is None:
        pytest.skip(f"{client} not installed: pip install 'triton-optim[trainers]'")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("with_trainers.py")), client]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class Wrapped:
    """A trainer's wrapper of an optimizer, as accelerate's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.train, self.eval = optimizer.train, optimizer.eval
        self.step, self.state_dict = optimizer.step, optimizer.state_dict


class GradientState:
    sync_gradients = True


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def backward(model: torch.nn.Module, seed: int) -> None:
    model(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


def straight(steps: int, accumulation: int = 1, **options: Any) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """The weights after a plain training, and the averages after each of its steps."""
    model = net()
    opt, averages = made(model, **options), {}
    for step in range(steps):
        for i in range(accumulation):
            backward(model, step * accumulation + i)
        opt.step()
        opt.zero_grad()
        if options.get("ema_decay", 0.8):
            with opt.averaged_parameters():
                averages[step] = values(model)
    return values(model), averages


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    modules = {"transformers": {"TrainerCallback": object}, "accelerate.state": {"GradientState": GradientState}}
    return stand_in(monkeypatch, "transformers", modules)


class Trainer:
    """What transformers' Trainer (5.24) does around a step, and what it tells callbacks."""

    def __init__(self, model: torch.nn.Module, opt: Any, callback: Any, **arguments: Any) -> None:
        self.model, self.optimizer, self.callback = model, Wrapped(opt), callback
        defaults = {"max_grad_norm": 0, "load_best_model_at_end": False, "gradient_accumulation_steps": 1}
        self.args = types.SimpleNamespace(**(defaults | arguments))
        self.state = types.SimpleNamespace(best_model_checkpoint=None)
        self.control = types.SimpleNamespace(should_save=False, should_evaluate=False)
        self.evaluated: dict[int, list[Tensor]] = {}
        self.saved: dict[int, Any] = {}

    def tell(self, event: str) -> None:
        hook = getattr(self.callback, event, None)
        if hook is not None:
            hook(self.args, self.state, self.control, optimizer=self.optimizer, model=self.model)

    def train(self, steps: Iterable[int], evaluates: Iterable[int] = (), saves: Iterable[int] = ()) -> None:
        self.tell("on_train_begin")
        accumulation = self.args.gradient_accumulation_steps
        for step in steps:
            for i in range(accumulation):
                GradientState.sync_gradients = i == accumulation - 1
                self.optimizer.train()
                backward(self.model, step * accumulation + i)
            self.optimizer.step()
            self.model.zero_grad()
            self.control.should_evaluate, self.control.should_save = step in evaluates, step in saves
            self.tell("on_step_end")
            self.evaluate_and_save(step)
        if self.args.load_best_model_at_end:
            self.state.best_model_checkpoint, best = "best", min(self.saved)
            self.model.load_state_dict(self.saved[best][0])
        self.tell("on_train_end")

    def evaluate_and_save(self, step: int) -> None:
        if self.control.should_evaluate:
            self.optimizer.eval()
            self.evaluated[step] = values(self.model)
            self.tell("on_evaluate")
        if self.control.should_save:
            self.saved[step] = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))


def loaded(saved: Any) -> tuple[torch.nn.Module, Any]:
    weights, states = copy.deepcopy(saved)
    model = net()
    opt = made(model)
    model.load_state_dict(weights)
    opt.load_state_dict(states)
    return model, opt


def resumed(saved: Any, steps: Iterable[int]) -> list[Tensor]:
    model, opt = loaded(saved)
    trainer = Trainer(model, opt, None)
    trainer.train(steps)
    return values(model)


@pytest.mark.parametrize("save", ["averages", "weights"])
def test_transformers_trainer_evaluates_and_saves_averages(save: Any, transformers: Any) -> None:
    model = net()
    trainer = Trainer(model, made(model), transformers.AveragedWeights(save))
    trainer.train(range(6), evaluates=(1, 3), saves=(2, 3, 4))
    weights, averages = straight(6)
    assert_same_bits(trainer.evaluated, {step: averages[step] for step in (1, 3)})
    for step, saved in trainer.saved.items():
        held = averages[step] if save == "averages" else straight(step + 1)[0]
        assert_same_bits(list(saved[0].values()), held)
        assert_same_bits(resumed(saved, range(step + 1, 6)), weights)
    assert_same_bits(values(model), averages[5] if save == "averages" else weights)


def test_transformers_trainer_saves_averages_at_the_end_of_an_epoch(transformers: Any) -> None:
    model = net()
    trainer = Trainer(model, made(model), transformers.AveragedWeights())
    trainer.train(range(2))
    trainer.optimizer.train()
    trainer.control.should_save = True
    trainer.tell("on_epoch_end")
    trainer.evaluate_and_save(1)
    assert_same_bits(list(trainer.saved[1][0].values()), straight(2)[1][1])


def test_the_best_model_stays(transformers: Any) -> None:
    model = net()
    trainer = Trainer(model, made(model), transformers.AveragedWeights(), load_best_model_at_end=True)
    trainer.train(range(4), saves=(1, 2))
    assert_same_bits(values(model), straight(2)[1][1])


def test_averages_in_place_of_what_else_an_optimizer_evaluates(transformers: Any) -> None:
    """Schedule-Free optimizers train elsewhere, and torch's have nothing to evaluate."""
    model = net()
    opt = to.ScheduleFreeAdamW(model.parameters(), lr=0.05, backend="eager")
    trainer = Trainer(model, opt, transformers.AveragedWeights())
    trainer.train(range(3), saves=(1,))
    assert not opt.training
    assert not any(group["train_mode"] for group in trainer.saved[1][1]["param_groups"])
    with pytest.raises(ValueError, match="Invalid save: 'ema'") as error:
        transformers.AveragedWeights("ema")
    explains(error, "averages")


@pytest.mark.parametrize("accumulation", [1, 3])
def test_transformers_trainer_releases_gradients(accumulation: int, transformers: Any) -> None:
    model = net()
    opt = made(model, ema_decay=None)
    callback = transformers.ReleaseGradients()
    trainer = Trainer(model, opt, callback, gradient_accumulation_steps=accumulation)
    seen = []
    step = opt.step
    trainer.optimizer.step = lambda: (seen.append(model.weight.grad), step())
    trainer.train(range(4))
    assert seen == [None] * 4  # it was gone before the step
    assert_same_bits(values(model), straight(4, accumulation, ema_decay=None)[0])
    assert opt.engine.release is None
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0") as error:
        Trainer(model, opt, callback, max_grad_norm=1.0).train([])
    explains(error, "clips")


def test_muons_factory(transformers: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 5))
    make = transformers.MuonFactory()
    muon = make(model, lr=0.02, heads=["2"], adamw={"lr": 3e-4}, max_grad_norm=1.0)
    assert type(muon) is to.Muon
    assert [(len(group["params"]), group["lr"]) for group in muon.param_groups] == [(1, 0.02), (4, 3e-4)]
    assert muon.max_grad_norm == 1.0
    assert type(make(model, optimizer=to.NorMuon, lr=0.02, heads=["2"])) is to.NorMuon


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    return stand_in(monkeypatch, "lightning", {"lightning.pytorch": {"Callback": object}})


class Fit:
    """What Lightning's Trainer (2.6) does around a step, and what it tells callbacks."""

    gradient_clip_val: Any = None

    def __init__(self, model: torch.nn.Module, opt: Any, callback: Any, accumulation: int = 1) -> None:
        self.model, self.callback, self.optimizers, self.accumulation = model, callback, [opt], accumulation
        self.strategy = self.fit_loop = self
        self.precision_plugin = types.SimpleNamespace()
        self.validated: dict[int, list[Tensor]] = {}
        self.saved: dict[int, Any] = {}
        self._accumulates = False

    def tell(self, event: str, *arguments: Any) -> None:
        hook = getattr(self.callback, event, None)
        if hook is not None:
            hook(self, self.model, *arguments)

    def _should_accumulate(self) -> bool:
        return self._accumulates

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> Any:
        return optimizer.state_dict()

    def save(self, step: int) -> None:
        states = [o.state_dict() for o in self.optimizers]
        checkpoint = {"state_dict": self.model.state_dict(), "optimizer_states": states}
        self.tell("on_save_checkpoint", checkpoint)
        self.saved[step] = copy.deepcopy((checkpoint["state_dict"], checkpoint["optimizer_states"][0]))

    def fit(self, epochs: Iterable[Iterable[int]], validates: bool = False, saves: Iterable[int] = ()) -> None:
        (opt,) = self.optimizers
        self.tell("on_train_start")
        for epoch in epochs:
            for step in epoch:
                self.tell("on_train_batch_start", None, step)
                self._accumulates = step % self.accumulation < self.accumulation - 1
                backward(self.model, step)
                if not self._accumulates:
                    opt.step()
                    opt.zero_grad()
                if step in saves:  # ModelCheckpoint(every_n_train_steps)
                    self.save(step)
            if validates:
                self.tell("on_validation_start")
                self.validated[step] = values(self.model)
            self.tell("on_train_epoch_end")
            self.save(step)
        self.tell("on_train_end")


def test_lightning_validates_and_saves_averages(lightning: Any) -> None:
    model = net()
    run = Fit(model, made(model), lightning.AveragedWeights())
    run.fit([range(3), range(3, 6)], validates=True, saves=(1, 4))
    weights, averages = straight(6)
    assert_same_bits(run.validated, {step: averages[step] for step in (2, 5)})
    for step, saved in run.saved.items():
        assert_same_bits(list(saved[0].values()), averages[step])
        assert_same_bits(resumed(saved, range(step + 1, 6)) if step < 5 else weights, weights)
        again, opt = loaded(saved)
        Fit(again, opt, lightning.AveragedWeights()).fit([range(step + 1, 6)] if step < 5 else [])
        assert_same_bits(values(again), averages[5])
    assert_same_bits(values(model), averages[5])


def test_lightning_leaves_optimizers_without_averages_alone(lightning: Any) -> None:
    model = net()
    run = Fit(model, made(model, ema_decay=None), lightning.AveragedWeights())
    run.fit([range(3)], validates=True, saves=(1,))
    assert_same_bits(values(model), straight(3, ema_decay=None)[0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning_releases_gradients(accumulation: int, lightning: Any) -> None:
    model = net()
    opt = made(model, ema_decay=None)
    run = Fit(model, opt, lightning.ReleaseGradients(), accumulation)
    run.fit([range(4)])
    assert_same_bits(values(model), straight(4 // accumulation, accumulation, ema_decay=None)[0])
    assert opt.engine.release is None
    run.precision_plugin.scaler = to.GradScaler("cpu")
    with pytest.raises(ValueError, match="16-mixed") as error:
        run.fit([])
    explains(error, "scales")
    run.gradient_clip_val = 0.5
    with pytest.raises(ValueError, match=r"gradient_clip_val=0\.5") as error:
        run.fit([])
    explains(error, "clips")
