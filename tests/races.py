"""What races run in the tests: a user's module with tasks whose answers are known."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from triton_optim.race import Watcher
from triton_optim.util.extras import DISTRIBUTIONS

needs_extras = pytest.mark.skipif(
    any(find_spec(module) is None for module in DISTRIBUTIONS), reason='needs the race extra: pip install -e ".[race]"'
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
