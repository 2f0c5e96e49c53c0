"""Between steps, all that Python lets a user do to parameters, gradients, states, groups and options, in any order:
ours beside torch's for-loop, and ours with its own options beside an eager optimizer that is made anew from the state.

After every step all values agree; or both sides raise; or ours raises an error of its own, by which nothing changed.
No step writes a gradient, a tensor that was replaced, or the memory around one.

100 sequences are run here, always the same. By hand, 2,000 others:

    TRITON_OPTIM_FUZZ=2000 pytest -n 0 tests/test_state_machine.py

With ``TRITON_OPTIM_FUZZ_LOG=FILE`` the actions of the last sequence are in that file, for when the process dies of it.
"""

from __future__ import annotations

import copy
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPP, TRITON
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from table import CASES, Case
from torch import Tensor
from torch.nn import Parameter
from user_actions import (
    GRADIENTS,
    KINDS,
    NUMBERS,
    PARAMETERS,
    STATES,
    Memory,
    Side,
    equal,
    give_all,
    in_another_thread,
    values,
)
from user_actions_on_groups import COPIES, GROUPS, OPTIONS

from triton_optim.backends.compiled import graph as compiled_graph
from triton_optim.core.saved_form import saved_states
from triton_optim.precision import codecs
from triton_optim.precision.averaging import value_of
from triton_optim.precision.codecs import Codec, part_names, read
from triton_optim.precision.kept import current_codec, current_parameter_codec
from triton_optim.util.layout import flat

BY_HAND = int(os.environ.get("TRITON_OPTIM_FUZZ", "0"))
LOG = os.environ.get("TRITON_OPTIM_FUZZ_LOG")
IN_CI = 100

# Actions that are left out, of all optimizers or of one, and why.
KNOWN: dict[str, str] = {
    "SGD: listed_twice": "torch starts the momentum of a parameter that is listed twice with the gradient each time",
    "Adagrad: added_group": "torch makes the states of an added group in its next step, ours at once",
    "Adagrad: state_of_one_cleared": "torch's copies raise KeyError",
}
# And those of optimizers that look at whole parameters: ours looks at all before it updates one, as torch's foreach.
TIED = ("tied_data", "states_tied")

# What an error of ours says where torch steps.
REFUSALS = (
    "cannot run .* parameters on",  # a backend that was asked for, and views with gaps or that overlap
    "the gradient of parameter .* has (shape|device)",
    "of parameter .* has shape .*the parameter",
    "was made in inference mode",
    "list parameter .* twice",  # as another than it stands for now
    "Clipping threshold d should be",
    "Nesterov momentum requires",  # what a constructor refuses, a step refuses
    "holds .* and lacks",  # a state dict of which a state was deleted
    "of parameter .* is .*, and .* beside a parameter of",  # a correction in another dtype
    "of parameter .* has .* items of .* scales of",  # codes or scales in another dtype
    "of parameter .* is .*, the parameter .* codes need their scales",
)

WAYS = ("step", "closure", "thread", "no_grad", "inference")  # how a step is made
BY_NAME = {case.name: case for case in CASES}
# What torch has, and one of ours without step counts, one that measures, and one that keeps another number beside the
# count: what is done to state and groups between steps is theirs alike.
OURS = ("Lion", "LAMB", "LaProp")
RULES = [case for case in CASES if (case.torchs or case.name in OURS) and not case.sparse]
ROUNDED = ("SGD", "AdamW", "Adam", "Adamax", "Adagrad")  # that torch can take a step of in bfloat16
SEEDS = st.integers(0, 1 << 16)
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2}
LEAST = {torch.float64: 1e-7, torch.float32: 1e-5, torch.bfloat16: 2e-2}

found: Counter[str] = Counter()


def tolerance(*tensors: Any) -> dict[str, float]:
    dtypes = [t.dtype for t in tensors if isinstance(t, Tensor) and t.dtype in CLOSE]
    return {"rtol": max(map(CLOSE.__getitem__, dtypes)), "atol": max(map(LEAST.__getitem__, dtypes))}


class Machine(RuleBasedStateMachine):
    """Sequences of actions; a subclass says what a step must come to."""

    backend = "eager"
    shapes: tuple[tuple[int, ...], ...] = ()
    left_out: tuple[str, ...] = ()  # actions that can't be compared

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Side] = []
        if LOG:
            open(LOG, "w").close()

    def log(self, text: str) -> None:
        if LOG:
            with open(LOG, "a") as file:
                file.write(text + "\n")

    def begin(self, case: Case, options: dict[str, Any], dtype: torch.dtype, seed: int, remembers: bool) -> None:
        self.log(f"{type(self).__name__} {case.name} {options} {dtype} {seed=} {remembers=}")
        self.case = case
        draw = random.Random(seed)
        makers = self.makers(case, options)
        shapes = self.shapes or (SHAPES_OF[draw.random() < 0.2] if case.elementwise else case.shapes)
        count = draw.choice((3, 4, 5, 8, 8, 40) if self.backend != "triton" or BY_HAND else (3, 4))
        cut = draw.randint(1, count)
        drawn = [values(draw, draw.choice(shapes), dtype) for _ in range(count)]
        for i, make in enumerate(makers):
            params = [Parameter(value.clone()) for value in drawn]
            groups: list[Any] = [{"params": params[:cut]}]
            if cut < count:
                groups.append({"params": params[cut:], "lr": 0.05})
            self.sides.append(Side(make, groups, Memory(remembers) if i == 0 else None, shapes))

    def makers(self, case: Case, options: dict[str, Any]) -> list[Callable[[Any], Any]]:
        raise NotImplementedError

    def do(self, act: Callable[[Side, random.Random], None], seed: int, name: str = "") -> bool:
        """The same on all sides, or the same error. Whether it was done."""
        known = {name, f"{self.case.name}: {name}"} & KNOWN.keys()
        if known or name in self.left_out or (name in TIED and not self.case.elementwise):
            return False
        self.log(f"{name or act} {seed}")
        raised = []
        for side in self.sides:
            try:
                act(side, random.Random(seed))
                raised.append(None)
            except Exception as error:
                raised.append(error)
        if any(raised):
            found[f"{name}: " + " | ".join(f"{type(e).__name__} {e}"[:150] if e else "-" for e in raised)] += 1
            if not all(raised) and not refused(raised[0]):
                raise AssertionError(f"{name}: ours, torch's: {raised}") from next(filter(None, raised))
            self.recover()
        return not any(raised)

    def table(self, table: dict[str, Any], name: str, seed: int) -> None:
        if self.do(table[name], seed, name) and table is COPIES:
            self.compare(loaded=True)

    @rule(name=st.sampled_from(sorted(GRADIENTS)), seed=SEEDS)
    def gradients(self, name: str, seed: int) -> None:
        self.table(GRADIENTS, name, seed)

    @rule(name=st.sampled_from(sorted(PARAMETERS)), seed=SEEDS)
    def parameters(self, name: str, seed: int) -> None:
        self.table(PARAMETERS, name, seed)

    @rule(name=st.sampled_from(sorted(STATES)), seed=SEEDS)
    def states(self, name: str, seed: int) -> None:
        self.table(STATES, name, seed)

    @rule(name=st.sampled_from(sorted(GROUPS)), seed=SEEDS)
    def groups(self, name: str, seed: int) -> None:
        self.table(GROUPS, name, seed)

    @rule(name=st.sampled_from(sorted(OPTIONS)), seed=SEEDS)
    def options(self, name: str, seed: int) -> None:
        self.table(OPTIONS, name, seed)

    @rule(name=st.sampled_from(sorted(COPIES)), seed=SEEDS)
    def copies(self, name: str, seed: int) -> None:
        self.table(COPIES, name, seed)

    @rule(kind=st.sampled_from(KINDS), missing=st.sampled_from((0.0, 0.3)), seed=SEEDS)
    def train(self, kind: str, missing: float, seed: int) -> None:
        """Gradients of one kind, and a step."""
        if self.do(lambda side, draw: give_all(side, draw, kind, missing), seed, f"train {kind} {missing}"):
            self.step()

    @rule(seed=SEEDS)
    def train_with_all_kinds(self, seed: int) -> None:
        if self.do(lambda side, draw: give_all(side, draw, "any", 0.1), seed, "train any"):
            self.step()

    @rule(steps=st.integers(1, 3), seed=SEEDS)
    def go_on(self, steps: int, seed: int) -> None:
        """Plain steps, as between two changes."""
        for k in range(steps):
            if self.do(lambda side, draw: give_all(side, draw, "plain"), seed + k, "train plain"):
                self.step()

    @rule(how=st.sampled_from(WAYS))
    def step_with_what_is_there(self, how: str) -> None:
        self.step(how)

    def step(self, how: str = "step") -> None:
        raise NotImplementedError

    def compare(self, loaded: bool = False) -> None:
        """What both sides are after a step, or after a copy."""

    def recover(self) -> None:
        raise NotImplementedError


SHAPES_OF = (((4, 3), (3,), (), (1,), (0,), (5, 1), (2, 3, 4), (2, 2, 2, 2), (7,)), ((4, 3), (3,)))


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


def take_step(side: Side, how: str) -> None:
    """A step, in one of the ways there are."""
    if how == "closure":
        gradients = [p.grad for p in side.params]

        def closure() -> float:
            for p, g in zip(side.params, gradients, strict=True):
                p.grad = g
            return 1.0

        side.opt.zero_grad()
        assert side.opt.step(closure) == 1.0
    elif how == "thread":
        in_another_thread(side.opt.step)
    elif how == "inference":
        with torch.inference_mode():
            side.opt.step()
    elif how == "no_grad":
        with torch.no_grad():
            side.opt.step()
    else:
        side.opt.step()


def snapshot(side: Side) -> tuple[list[Tensor], dict[int, dict[str, Any]]]:
    """Copies of the parameters and of the states, by the place of the parameter."""
    states = {
        i: {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in side.opt.state[p].items()}
        for i, p in enumerate(side.params)
        if p in side.opt.state
    }
    return [p.detach().clone() for p in side.params], states


def assert_unchanged(before: tuple[Any, Any], after: tuple[Any, Any], error: Exception) -> None:
    for i, (p, q) in enumerate(zip(before[0], after[0], strict=True)):
        assert equal(p, q), f"parameter {i} changed in a step that raised {error!r}"
    for i, state in before[1].items():
        for name, value in state.items():
            now = after[1].get(i, {}).get(name)
            same = equal(value, now) if isinstance(value, Tensor) and isinstance(now, Tensor) else value is now or (
                value == now
            )  # fmt: skip
            assert same, f"{name} of parameter {i} changed in a step that raised {error!r}"


def refused(error: Exception | None) -> bool:
    """Whether it is an error of ours that is meant."""
    return any(re.search(text, str(error)) for text in REFUSALS)


def attempt(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def assert_alike(ours: Side, theirs: Side, rounded: bool = False) -> None:
    """Equal values, as far as rounding lets them."""
    coarse = [torch.empty(0, dtype=torch.bfloat16)] * rounded
    for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        mine, other = ours.opt.state.get(p, {}), theirs.opt.state.get(q, {})
        if not other and p.grad is None:
            continue  # Adagrad of ours has states from the start, those of a group that was added too
        assert set(mine) == set(other), f"parameter {i} has states {sorted(mine)}, torch's {sorted(other)}"
        near = tolerance(p, q, p.grad, *coarse, *mine.values(), *other.values())
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


class BesideATwin(Machine):
    """Options that torch has none of: beside an eager optimizer that is made anew from the state before each step."""

    # A copy is not tied; and no parameter of another dtype can be given to a new optimizer with this precision.
    left_out = ("tied_data", "states_tied", "cast", "data_of_another_dtype")
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
            if not refused(mine):
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
                current_codec(opt, state, name, p)
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


def coarse(codec: Codec, near: dict[str, float], largest: float) -> dict[str, float]:
    """How far two values may be that were kept so, of which each was rounded."""
    if codec.block_size:
        # A step of the codes, of which the finest are near 0.
        return {"rtol": 0.5 if "4" in codec.name else 0.1, "atol": 1e-2}
    own = tolerance(*(torch.empty(0, dtype=dtype) for dtype in codec.dtypes))
    return {name: max(near[name], own[name]) for name in near}


def assert_near(mine: Tensor, value: Tensor, near: dict[str, float], what: str) -> None:
    assert mine.shape == value.shape, f"{what} has shape {mine.shape}, the twin's {value.shape}"
    a, b = mine.detach().double(), value.detach().double()
    assert torch.allclose(a, b, **near, equal_nan=True), f"{what}: {a}, the twin's {b}"


def restart(side: Side) -> None:
    """After an error: no gradients, no states, the options of the start."""
    for group in side.groups:
        group |= {name: v for name, v in side.opt.defaults.items() if name not in ("foreach", "fused")}
    for p in side.params:
        p.grad = None
        p.data = p.data.clone(memory_format=torch.contiguous_format)
        p.grad_dtype = p.dtype
        for value in side.opt.state.get(p, {}).values():
            side.replaced(value)
    side.opt.state.clear()


def settings_of(share: float, steps: int) -> settings:
    """Of so much of all sequences."""
    return settings(
        max_examples=max(1, round((BY_HAND or IN_CI) * share)),
        stateful_step_count=50 if BY_HAND else steps,
        derandomize=not BY_HAND,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if BY_HAND else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


class Uncompiled:
    """In place of a compiled graph: the body as it is. To compile it takes seconds, and which tensors it gets is
    decided before.
    """

    def __init__(self, name: str, body: Any, slot: list[Any], key: bool, *_: Any) -> None:
        self.body, self.roles = body, len(slot) + key
        self.flat = [not shape for _, shape in slot] + [False] * key

    def __call__(self, row: Tensor, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            for start in range(0, len(tensors), self.roles):
                own = zip(self.flat, tensors[start : start + self.roles], strict=True)
                self.body([flat(t) if as_flat else t for as_flat, t in own], row)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_graph, "Graph", Uncompiled)
    for name in ("graph_for", "codes_graph_for"):
        monkeypatch.setattr(compiled_graph, name, cache(getattr(compiled_graph, name).__wrapped__))


def run(machine: type[Machine], backend: str, share: float, **attributes: Any) -> None:
    machine = type(f"{machine.__name__}_{backend}", (machine,), {"backend": backend, **attributes})
    run_state_machine_as_test(machine, settings=settings_of(share, 10 if backend == "triton" else 20))


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


@pytest.mark.parametrize(
    ("backend", "share"),
    [
        pytest.param("auto", 0.07, marks=CPP),
        pytest.param("compiled", 0.03),
        pytest.param("triton", 0.02, marks=TRITON),
    ],
)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_beside_a_twin(backend: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MIN_QUANTIZED_NUMEL", 64)
    run(BesideATwin, backend, share, cases=BesideATwin.cases if BY_HAND else [BY_NAME["AdamW"]])
