"""How long is a step of a small model on a CPU, where it is host time, beside torch's fused step?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from host_profile import give_new_gradients

import triton_optim
from triton_optim.bench.agreement import Contender, assert_agree
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import Shapes, conv, linear, parameters, shapes
from triton_optim.race.training import threads
from triton_optim.util import gather

# The network of `triton-optim demo`, and one as of an agent that learns by reinforcement.
DEMO: Shapes = [*conv(32, 1, 3), *conv(32, 32, 3), *conv(64, 32, 3), *linear(256, 256), *linear(10, 256)]
MLP: Shapes = [*linear(64, 8), *linear(64, 64) * 3, *linear(4, 64)]
EARLY = range(2, 16)  # steps that a training has just begun with


class Case(NamedTuple):
    """An optimizer on a model."""

    optimizer: str
    settings: dict[str, Any]
    model: str
    shapes: Shapes
    threads: int
    target: float  # of torch's fused step
    scheduled: bool = False  # two groups, of which only weights decay, and another rate in each step

    @property
    def name(self) -> str:
        """In words."""
        scheduled = ", two groups and a schedule" * self.scheduled
        return f"{self.optimizer}, {self.model}{scheduled}, {self.threads} thread{'s' * (self.threads > 1)}"


ADAMW, SGD = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "momentum": 0.9}
CASES = [
    Case("AdamW", ADAMW, "MLP of 10 tensors", MLP, 1, 0.4),
    Case("SGD", SGD, "MLP of 10 tensors", MLP, 1, 0.5),
    Case("AdamW", ADAMW, "the demo's 10 tensors", DEMO, 1, 0.4),
    Case("AdamW", ADAMW, "the demo's 10 tensors", DEMO, 1, 0.4, scheduled=True),
    Case("AdamW", ADAMW, "1 tensor of 1,000", shapes("1x1k"), 1, 0.5),
    Case("AdamW", ADAMW, "100 tensors of 1,000", shapes("100x1k"), 1, 0.2),
    Case("AdamW", ADAMW, "1,000 tensors of 1,000", shapes("1000x1k"), 2, 0.08),
]


def contender(name: str, module: Any, case: Case, **options: Any) -> Contender:
    params = list(parameters(case.shapes))
    groups: Any = params
    if case.scheduled:
        kinds = [[p for p in params if (p.dim() > 1) is decays] for decays in (True, False)]
        decays = (case.settings["weight_decay"], 0.0)
        groups = [{"params": kind, "weight_decay": decay} for kind, decay in zip(kinds, decays, strict=True)]
    optimizer = getattr(module, case.optimizer)(groups, **case.settings, **options)
    return Contender(name, optimizer, params, optimizer.step)


def prepared(c: Contender, case: Case, new: bool) -> Side:
    """With what happens before each step."""

    def prepare() -> None:
        if new:
            give_new_gradients(c.params)
        if case.scheduled:
            for group in c.optimizer.param_groups:
                group["lr"] = group["lr"] * 0.999999

    return Side(c.name, c.step, prepare)


def sides_of(case: Case) -> list[Contender]:
    return [
        contender("ours", triton_optim, case),
        contender("torch-fused", torch.optim, case, fused=True),
        contender("torch-for-loop", torch.optim, case, foreach=False),
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(",", ""))
@pytest.mark.parametrize("gradients", ["kept", "new"])
def test_step(case: Case, gradients: str, benchmark: Callable, answer: Callable, patience: float) -> None:
    """With gradients that stay, as after ``zero_grad(set_to_none=False)``, and with new ones before each step."""
    with threads(case.threads):
        assert_agree(sides_of(case))
        contenders = sides_of(case)
        gather.library.load()
        sides = [prepared(c, case, gradients == "new") for c in contenders]
        m = measure(sides, patience, turn=min(20, max(1, 5_000 // len(case.shapes))), warm_up=3)
        ratios, words = m.compared("ours", ["torch-fused"])
        loop, _ = m.compared("ours", ["torch-for-loop"])
        text = f"{1e6 * m.median('ours'):.0f} us, {words}, {loop['ratio']:.3f} x its for-loop"
        figures = {f"{c.name} us": 1e6 * m.median(c.name) for c in contenders} | ratios
        answer(f"{case.name}, {gradients} gradients", text, figures, value=ratios["ratio"], target=case.target,
               measurement=m)  # fmt: skip
        benchmark.pedantic(contenders[0].step, rounds=100)


def test_steps_of_experts(benchmark: Callable, answer: Callable, patience: float) -> None:
    """A random fifth of the parameters has no gradient, as with experts that no token chose: by then the others were
    updated in as many different numbers of steps.
    """
    case = CASES[-2]
    with threads(case.threads):
        contenders = sides_of(case)
        gather.library.load()

        def prepare(c: Contender, all_of_them: list[torch.Tensor], random: Random) -> None:
            for p, g in zip(c.params, all_of_them, strict=True):
                p.grad = None if random.random() < 0.2 else g.clone()

        given = [[p.grad for p in c.params] for c in contenders]
        sides = [
            Side(c.name, c.step, partial(prepare, c, g, Random(0))) for c, g in zip(contenders, given, strict=True)
        ]
        m = measure(sides, patience, turn=20, warm_up=3)
        ratios, words = m.compared("ours", ["torch-fused"])
        figures = {f"{c.name} us": 1e6 * m.median(c.name) for c in contenders} | ratios
        text = f"{1e6 * m.median('ours'):.0f} us, {words}"
        answer(f"{case.name}, a fifth of them without a gradient", text, figures, value=ratios["ratio"], target=1.0,
               measurement=m)  # fmt: skip
        benchmark.pedantic(contenders[0].step, rounds=100)


@pytest.mark.parametrize("case", [CASES[0], CASES[-2], CASES[-1]], ids=lambda case: case.name.replace(",", ""))
def test_early_steps(case: Case, benchmark: Callable, answer: Callable, patience: float) -> None:
    """Steps 2 to 15 of new optimizers beside step 40 and later ones of old ones, with new gradients each."""
    with threads(case.threads):
        gather.library.load()
        old = contender("later", triton_optim, case)
        for _ in range(40):
            give_new_gradients(old.params)
            old.step()
        young = contender("early", triton_optim, case)
        taken = 0

        def renew() -> None:
            nonlocal young, taken
            taken += 1
            if taken >= EARLY.stop or taken == 1:
                young, taken = contender("early", triton_optim, case), 2
                give_new_gradients(young.params)
                young.step()
            give_new_gradients(young.params)

        sides = [
            Side("early", lambda: young.step(), renew),
            Side("later", old.step, partial(give_new_gradients, old.params)),
        ]
        m = measure(sides, patience, warm_up=3)
        ratios, words = m.compared("early", ["later"])
        answer(f"{case.name}: steps 2 to 15", words, ratios, value=ratios["ratio"], target=1.3, measurement=m)
        benchmark.pedantic(old.step, rounds=100)
