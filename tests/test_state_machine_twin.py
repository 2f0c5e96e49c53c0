"""As test_state_machine.py: ours with its own options, beside an eager optimizer that is made anew from the state."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CPP, TRITON
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from state_machine import (
    BY_HAND,
    BY_NAME,
    RULES,
    SEEDS,
    Machine,
    assert_unchanged,
    attempt,
    coarse,
    found,
    refused,
    restart,
    run,
    snapshot,
    take_step,
    tolerance,
)
from state_machine import uncompiled as uncompiled
from table import Case
from torch import Tensor
from torch.nn import Parameter
from user_sides import NUMBERS, equal

from triton_optim.core.saved_form import saved_states
from triton_optim.precision import codecs
from triton_optim.precision.averaging import value_of
from triton_optim.precision.codecs import part_names, read
from triton_optim.precision.kept import current_codec, current_parameter_codec


class BesideATwin(Machine):
    """Options that torch has none of: beside an eager optimizer that is made anew from the state before each step."""

    # A copy is not tied; and a new optimizer takes no parameter twice, and none of another dtype with this precision.
    left_out = ("tied_data", "states_tied", "listed_twice", "cast", "data_of_another_dtype")
    cases = tuple(case for case in RULES if case.elementwise)
    precisions = ("storage", "stochastic", "kahan", "split24", "split32", "master")
    dtypes = (None, torch.float32, torch.bfloat16, "int8", "int4")

    @initialize(data=st.data(), seed=SEEDS, remembers=st.booleans())
    def start(self, data: Any, seed: int, remembers: bool) -> None:
        case = data.draw(st.sampled_from(self.cases))
        precision, kept = data.draw(st.sampled_from(self.precisions)), data.draw(st.sampled_from(self.dtypes))
        whole = data.draw(st.fixed_dictionaries({}, optional=WHOLE))
        self.begin(case, *self.drawn(case, precision, kept, whole), seed, remembers)

    @classmethod
    def drawn(cls, case: Case, precision: str, kept: Any, whole: dict[str, Any]) -> tuple[dict[str, Any], torch.dtype]:
        options = case.settings | {"lr": 0.1, "param_precision": precision, "state_dtype": kept, "seed": 5} | whole
        if "ema_decay" not in options:
            options.pop("ema_dtype", None)
        return options, torch.float32 if precision == "storage" else torch.bfloat16

    def makers(self, case: Case, options: dict[str, Any]) -> list[Callable[[Any], Any]]:
        self.chosen = options
        self.shapes = ((20, 16), (300,), (4, 3), (), (0,), (64,))
        return [lambda groups: case.ours(groups, **options, backend=self.backend)]

    def twin(self) -> tuple[Any, list[Parameter]]:
        """An eager optimizer of copies of the parameters and states."""
        ours = self.sides[0]
        copies: dict[int, Parameter] = {}
        for p in ours.params:
            q = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype).copy_(p.detach())
            q = copies[id(p)] = Parameter(q, requires_grad=p.requires_grad)
            q.grad_dtype = p.grad_dtype
            q.grad = None if p.grad is None else p.grad.clone()
        groups = [group | {"params": [copies[id(p)] for p in group["params"]]} for group in ours.groups]
        twin = self.case.ours(groups, **self.chosen, backend="eager")
        saved = [{**group, "params": list(group["params"])} for group in ours.groups]
        numbers = iter(range(len(ours.params)))
        for group in saved:
            group["params"] = [next(numbers) for _ in group["params"]]
        kept = dict(zip(ours.opt.state, saved_states(ours.opt, ours.opt.state), strict=True))
        states = {i: kept[p] for i, p in enumerate(ours.params) if p in kept}
        twin.load_state_dict(copy.deepcopy({"state": states, "param_groups": saved}))
        return twin, [copies[id(p)] for p in ours.params]

    def step(self, how: str = "step") -> None:
        ours = self.sides[0]
        self.log(f"step {how}")
        before = snapshot(ours)
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in ours.params]
        unmade = None
        try:
            twin, copies = self.twin()
        except Exception as error:
            unmade = error
        scaled = "amp" in self.chosen and random.Random(str(before[0][:1])).random() < 0.7
        found_inf = float(how == "closure")
        if scaled:
            for opt in (ours.opt, *([twin] if unmade is None else ())):
                opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
        mine = attempt(lambda: take_step(ours, how))
        other = unmade or attempt(twin.step)
        if scaled:
            del ours.opt.grad_scale, ours.opt.found_inf
        if mine is not None:
            found[f"ours raises: {type(mine).__name__}: {re.sub('[0-9]+', 'N', str(mine))[:160]} | {other!r:.120}"] += 1
            assert_unchanged(before, snapshot(ours), mine)
            of_the_closure = str(mine).startswith("attempting to assign a gradient")  # one of another shape
            if not (refused(mine) or of_the_closure):
                raise AssertionError(f"ours raised: {mine!r}") from mine
            self.recover()
            return
        if other is not None:
            if refused(other):  # a state of which a part is gone steps, and cannot be loaded
                return
            raise AssertionError(f"the twin raised: {other!r}") from other
        for i, (p, g, was) in enumerate(zip(ours.params, [p.grad for p in ours.params], gradients, strict=True)):
            assert (g is None) == (was is None), f"the gradient of parameter {i} came or went"
            assert g is None or equal(g, was), f"the step wrote the gradient of parameter {i}"
            del p
        ours.memory.check([*ours.params, *(value for _, _, value in ours.states())])
        for i, (p, q) in enumerate(zip(ours.params, copies, strict=True)):
            mine, theirs = self.decoded(ours.opt, p), self.decoded(twin, q)
            assert set(mine) == set(theirs), f"parameter {i} has {sorted(mine)}, the twin's {sorted(theirs)}"
            for name, (value, near) in theirs.items():
                assert_near(mine[name][0], value, near, f"{name} of parameter {i}")

    def decoded(self, opt: Any, p: Parameter) -> dict[str, tuple[Tensor, dict[str, float]]]:
        """The values of a parameter and its states, and how far they may be from the twin's."""
        state = opt.state.get(p, {})
        near = tolerance(p, p.grad)
        values = {"value": (p.detach(), near)}
        if part_names(current_parameter_codec(state, p), None):
            values["exact value"] = (value_of(state, p), CORRECTED)
        for name, held in state.items():
            codec = (
                current_codec(opt, state, name)
                if name in opt.running_variant(opt.param_groups[0]).state_names
                else None
            )
            if codec is not None:
                parts = [held, *(state[part] for part in part_names(codec, name))]
                largest = float(held.abs().max()) if held.numel() else 0.0
                values[name] = (read(codec, parts, p), coarse(codec, near, largest))
            elif name in NUMBERS:
                values[name] = (torch.as_tensor(held), tolerance(torch.empty(0)))
        return values

    def compare(self, loaded: bool = False) -> None:
        pass

    def recover(self) -> None:
        ours = self.sides[0]
        restart(ours)


CORRECTED = {"rtol": 1e-3, "atol": 1e-3}
WHOLE: Any = {
    "ema_decay": st.just(0.9),
    "ema_dtype": st.sampled_from((torch.float32, torch.bfloat16)),
    "max_grad_norm": st.just(0.5),
    "amp": st.just("fused"),
}


def assert_near(mine: Tensor, value: Tensor, near: dict[str, float], what: str) -> None:
    assert mine.shape == value.shape, f"{what} has shape {mine.shape}, the twin's {value.shape}"
    a, b = mine.detach().double(), value.detach().double()
    assert torch.allclose(a, b, **near, equal_nan=True), f"{what}: {a}, the twin's {b}"


@pytest.mark.parametrize(
    ("backend", "share"),
    [pytest.param("auto", 0.07, marks=CPP), pytest.param("compiled", 0.03), pytest.param("triton", 0.02, marks=TRITON)],
)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_beside_a_twin(backend: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MIN_QUANTIZED_NUMEL", 64)
    run(BesideATwin, backend, share, cases=BesideATwin.cases if BY_HAND else [BY_NAME["AdamW"]])
