"""Between steps, all that Python lets a user do to parameters, gradients, states, groups and options, in any order:
ours beside torch's for-loop, and ours with its own options beside an eager optimizer that is made anew from the state.

After every step all values agree; or both sides raise; or ours raises an error of its own, by which nothing changed.
No step writes a gradient, a tensor that was replaced, or the memory around one.

100 sequences are run here, always the same. By hand, 2,000 others:

    TRITON_OPTIM_FUZZ=2000 pytest -n 0 tests/test_state_machine*.py

With ``TRITON_OPTIM_FUZZ_LOG=FILE`` the actions of the last sequence are in that file, for when the process dies of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPP, TRITON
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from state_machine import (
    BY_HAND,
    BY_NAME,
    RULES,
    SEEDS,
    Machine,
    assert_unchanged,
    attempt,
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
from user_sides import Side, equal

ROUNDED = ("SGD", "AdamW", "Adam", "Adamax", "Adagrad")  # that torch can take a step of in bfloat16


def copied(value: Any) -> Any:
    """A copy of a tensor, made in inference mode where it was: what may not be written may not be written there."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(value.is_inference()):
        return value.detach().clone()


def memory_of(value: Any) -> Any:
    """What tells apart values that lie in different memory."""
    if not isinstance(value, Tensor) or not value.numel():
        return object()
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def of_those_in(p: Tensor, side: Side) -> list[Any]:
    """The gradients and states of a parameter and of those that lie where it does: each rounds what it writes there."""
    there = [q for q in side.params if q is p or (p.numel() and q.data_ptr() == p.data_ptr())]
    return [value for q in there for value in (q.grad, *side.opt.state.get(q, {}).values())]


def assert_alike(ours: Side, theirs: Side, rounded: bool = False) -> None:
    """Equal values, as far as rounding lets them."""
    coarse = [torch.empty(0, dtype=torch.bfloat16)] * rounded
    for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        mine, other = ours.opt.state.get(p, {}), theirs.opt.state.get(q, {})
        if not other and p.grad is None:
            continue  # Adagrad of ours has states from the start, those of a group that was added too
        assert set(mine) == set(other), f"parameter {i} has states {sorted(mine)}, torch's {sorted(other)}"
        near = tolerance(p, q, *coarse, *of_those_in(p, ours), *of_those_in(q, theirs))
        assert p.dtype == q.dtype
        pairs = [("value", p.detach(), q.detach())]
        pairs += [(name, mine[name], value) for name, value in other.items() if isinstance(value, Tensor)]
        for name, a, b in pairs:
            exactly = name == "step"
            a, b = torch.as_tensor(a), b.detach()
            assert a.shape == b.shape, f"{name} of parameter {i} has shape {a.shape}, torch's {b.shape}"
            a, b = a.detach().double(), b.double()
            fits = equal(a, b) if exactly else torch.allclose(a, b, **near, equal_nan=True)
            assert fits, f"{name} of parameter {i}: {a}, torch's {b}"


class BesideTorch(Machine):
    """Ours beside torch's for-loop. After a step torch's goes on with our values, so that no rounding adds up."""

    cases = tuple(RULES)

    @initialize(data=st.data(), seed=SEEDS, remembers=st.booleans())
    def start(self, data: Any, seed: int, remembers: bool) -> None:
        case = data.draw(st.sampled_from(self.cases))
        options = case.variants[data.draw(st.sampled_from(sorted(case.variants)))]
        dtypes = [torch.float32, torch.float32, torch.float64] + [torch.bfloat16] * (case.name in ROUNDED)
        self.begin(case, {"lr": 0.1} | options, data.draw(st.sampled_from(dtypes)), seed, remembers)

    def makers(self, case: Case, options: dict[str, Any]) -> list[Callable[[Any], Any]]:
        foreach = {"foreach": False} if case.peer_takes("foreach") else {}
        return [
            lambda groups: case.ours(groups, **options, backend=self.backend),
            lambda groups: case.peer(groups, **options, **foreach),
        ]

    @rule()
    def states_exchanged(self) -> None:
        """Each loads what the other saved."""
        ours, theirs = self.sides
        self.log("states_exchanged")
        try:
            mine, other = (copy.deepcopy(side.opt.state_dict()) for side in self.sides)
        except KeyError:  # the state of a parameter that was removed
            return
        for saved in (mine, other):
            for group in saved["param_groups"]:
                group.pop("foreach", None)
        for group in mine["param_groups"]:
            group["foreach"] = False
            # NumPy's, in whose precision torch would go on.
            group |= {name: float(value) for name, value in group.items() if isinstance(value, np.floating)}
        for group in other["param_groups"]:
            group["foreach"] = None
        raised = [attempt(lambda: ours.opt.load_state_dict(other)), attempt(lambda: theirs.opt.load_state_dict(mine))]
        assert not any(raised) or refused(raised[0]), raised
        if any(raised):
            self.recover()

    def step(self, how: str = "step") -> None:
        ours, theirs = self.sides
        self.log(f"step {how}")
        before, gradients = snapshot(ours), [g if g is None else g.clone() for g in (p.grad for p in ours.params)]
        mine = attempt(lambda: take_step(ours, how))
        given = [p.grad for p in ours.params]
        for i, (g, was) in enumerate(zip(given, gradients, strict=True)):
            if mine is not None and how == "closure":
                break  # the closure may have raised
            assert (g is None) == (was is None), f"the gradient of parameter {i} came or went"
            assert g is None or equal(g, was), f"the step wrote the gradient of parameter {i}"
        ours.memory.check([*ours.params, *(value for _, _, value in ours.states())])
        other = attempt(lambda: take_step(theirs, how))
        if mine is not None:
            found[f"ours raises: {type(mine).__name__}: {re.sub('[0-9]+', 'N', str(mine))[:160]} | {other!r:.120}"] += 1
            assert_unchanged(before, snapshot(ours), mine)
            if other is None and not refused(mine):
                raise AssertionError(f"ours raised where torch steps: {mine!r}") from mine
            self.recover()
        elif other is not None:
            found[f"torch raises: {re.sub('[0-9]+', 'N', repr(other)):.160}"] += 1
            self.follow()
        else:
            self.compare()

    def compare(self, loaded: bool = False) -> None:
        """Values are equal, and torch's side goes on with ours. Where it `loaded` a state, torch may have cast it."""
        ours, theirs = self.sides
        assert_alike(ours, theirs, loaded)
        if attempt(self.copy_values) is not None:  # torch's are not to be written: inference tensors
            self.follow()

    @torch.no_grad()
    def copy_values(self) -> None:
        ours, theirs = self.sides
        for p, q in zip(ours.params, theirs.params, strict=True):
            q.copy_(p)
            for name, value in theirs.opt.state.get(q, {}).items():
                if isinstance(value, Tensor):
                    value.copy_(torch.as_tensor(ours.opt.state[p][name]))

    def follow(self) -> None:
        """Give torch's side what ours has, after an error that left it halfway. What shares memory goes on to."""
        ours, theirs = self.sides
        copies: dict[Any, Any] = {}
        for p, q in zip(ours.params, theirs.params, strict=True):
            p.data = p.data.clone()
            q.data = p.data.clone()
            theirs.opt.state.pop(q, None)
            if p in ours.opt.state:
                theirs.opt.state[q] = {
                    name: copies.setdefault(memory_of(v), copied(v)) for name, v in ours.opt.state[p].items()
                }

    def recover(self) -> None:
        for side in self.sides:
            restart(side)
        self.follow()


# Each rule is compiled by C++ in a second, and interpreted slowly.
SOME = [BY_NAME[name] for name in ("SGD", "AdamW", "NAdam")]


@pytest.mark.parametrize(
    ("backend", "share", "cases"),
    [
        pytest.param("eager", 0.28, RULES),
        pytest.param("auto", 0.35, RULES if BY_HAND else SOME, marks=CPP),
        pytest.param("compiled", 0.2, RULES),
        pytest.param("triton", 0.05, RULES if BY_HAND else SOME, marks=TRITON),
    ],
)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_beside_torch(backend: str, share: float, cases: list[Case]) -> None:
    run(BesideTorch, backend, share, cases=cases)
