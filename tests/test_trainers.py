"""docs/trainers runs, each page where its client is installed, and so do our callbacks in it; callbacks and registries
also with small stand-ins for the clients, which CI does not install. Pages of several processes run in
test_two_ranks_wrapped.py.
"""

import copy
import importlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from complaints import explains
from torch import Tensor

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


# Stand-ins


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, modules: dict[str, dict[str, Any]]) -> Any:
    """The module `name` of integrations, which finds these modules in the place of its client's."""
    paths = {".".join(path.split(".")[: i + 1]) for path in modules for i in range(len(path.split(".")))}
    for path in sorted(paths):
        module = types.ModuleType(path)
        module.__dict__.update(modules.get(path, {}))
        monkeypatch.setitem(sys.modules, path, module)
    own = f"triton_optim.integrations.{name}"
    monkeypatch.delitem(sys.modules, own, raising=False)
    module = importlib.import_module(own)
    monkeypatch.delitem(sys.modules, own)
    return module


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


def made(model: torch.nn.Module, **options: Any) -> Any:
    return to.AdamW(model.parameters(), **({"lr": 0.05, "ema_decay": 0.8, "backend": "eager"} | options))


def backward(model: torch.nn.Module, seed: int) -> None:
    model(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


def values(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same_bits(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


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


@dataclass
class OptimInfo:
    name: str
    opt_class: Any
    description: str
    has_eps: bool
    has_momentum: bool
    has_betas: bool
    num_betas: int
    defaults: Any


def test_timm_is_told_of_every_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, OptimInfo] = {}
    registry = types.SimpleNamespace(register=lambda info: known.update({info.name: info}))
    modules = {"timm.optim": {"OptimInfo": OptimInfo}, "timm.optim._optim_factory": {"default_registry": registry}}
    names = stand_in(monkeypatch, "timm", modules).register_optimizers()
    assert names == [*known]
    assert {"tritonadamw", "tritonmuon", "tritonlion", "tritonschedulefreeadamw"} <= known.keys()
    assert not any("_" in name for name in known)  # timm reads what is after it
    adamw, sgd, adan = (known[f"triton{name}"] for name in ("adamw", "sgd", "adan"))
    assert (adamw.opt_class, adamw.has_betas, adamw.has_momentum, adamw.num_betas) == (to.AdamW, True, False, 2)
    assert (sgd.has_momentum, sgd.has_eps, sgd.defaults, adan.num_betas) == (True, False, {"nesterov": True}, 3)
    matrix, head, bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 3), (2, 3), (3,)))
    groups = [{"params": [matrix, bias], "lr_scale": 0.5}, {"params": [head], "use_fallback": True}]
    muon = known["tritonmuon"].opt_class(groups, adamw={"lr": 1e-3}, lr=0.02, weight_decay=0.0)
    shown = [({id(p) for p in g["params"]}, g["lr"], g.get("use_muon", True)) for g in muon.param_groups]
    assert shown == [({id(matrix)}, 0.02, True), ({id(bias)}, 1e-3, False), ({id(head)}, 1e-3, False)]
    assert [g.get("lr_scale") for g in muon.param_groups] == [0.5, 0.5, None]
    assert len(known["tritonmuon"].opt_class([matrix, bias], lr=0.02).param_groups) == 2


class TheirContainer:
    """torchtitan's (0.3), as far as optimizers are made."""

    @dataclass(kw_only=True)
    class Config:
        implementation: str = "fused"

    def __init__(self, name: str, groups: list[dict[str, Any]], **options: Any) -> None:
        self.optimizers = [self._resolve_optimizer_factory(name)(groups, **options)]
        self.hooked = False

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        if name != "DistMuon":
            raise NotImplementedError(name)
        return torch.optim.SGD

    def _register_bf16_optimizer_state_hook(self) -> None:
        self.hooked = True


def test_torchtitans_container_makes_our_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"torchtitan.components.optimizer": {"OptimizersContainer": TheirContainer}}
    made = stand_in(monkeypatch, "torchtitan", modules).OptimizersContainer
    p = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]

    def groups(*options: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [each], "lr": 0.1, **own} for each, own in zip(p, options, strict=True)]

    limit: dict[str, Any] = {"max_grad_norm": 0.5, "backend": "eager"}
    container = made("AdamW", groups({**limit, "weight_decay": 0.0}, limit))
    (optimizer,) = container.optimizers
    assert type(optimizer) is to.AdamW
    assert (optimizer.max_grad_norm, optimizer.backend) == (0.5, "eager")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-2]
    assert made("AdamW", groups({}, {}), max_grad_norm=2.0).optimizers[0].max_grad_norm == 2.0
    container._register_bf16_optimizer_state_hook()
    assert container.hooked
    for each in p:
        each.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[p[0]]["exp_avg"].dtype == torch.bfloat16
    assert type(made("DistMuon", groups({}, {})).optimizers[0]) is torch.optim.SGD
    with pytest.raises(NotImplementedError):
        made("Adamm", groups({}, {}))
    with pytest.raises(ValueError, match="patterns of AdamW have max_grad_norm") as error:
        made("AdamW", groups(limit, {"backend": "eager"}))
    explains(error, "[0.5, None]", "optimizer_factory_kwargs_by_name")
