"""Sequences of what users do between steps, and steps that are compared: what both state machines are made of."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from table import CASES, Case
from torch import Tensor
from torch.nn import Parameter
from user_actions import GRADIENTS, KINDS, PARAMETERS, give_all, in_another_thread
from user_actions_on_groups import COPIES, GROUPS, OPTIONS
from user_actions_on_states import STATES
from user_sides import Memory, Side, equal, values

from triton_optim.backends.compiled import graph as compiled_graph
from triton_optim.precision.codecs import Codec
from triton_optim.spec import COUNT
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
    "Invalid growth_rate",
    "Nesterov momentum requires",  # what a constructor refuses, a step refuses
    r"RMSprop\(centered=True\) takes the root",  # likewise
    "holds .* and lacks",  # a state dict of which a state was deleted
    "is quantized and does not say how",  # or of which the scales alone are left
    "of parameter .* is .*, and .* beside a parameter of",  # a correction in another dtype
    "of parameter .* has items of shape .* scales of shape",  # codes or scales of another dtype or size
    "of parameter .* is .*, the parameter .* codes need their scales",
    "loaded state dict has a (parameter group that doesn't match|different number)",  # than when it was saved
    "of parameter .* is .*, the parameter .* Load a state dict of a model",
    "a step on the host can't be capturable",
    'backend="triton" runs no step on the host',
    "takes the root of square_avg - grad_avg",
    "states of complex parameters are complex",
    "Give both real, or both complex",
    "rows (where they were gathered|are updated where)",
    'offload="cpu": the gradient of parameter .* is sparse',
    "state_dtype=.* is for states like their parameter",
)

WAYS = ("step", "closure", "thread", "no_grad", "inference")  # how a step is made
BY_NAME = {case.name: case for case in CASES}
# What torch has, and one of ours without step counts, one that measures, and one that keeps another number beside the
# count: what is done to state and groups between steps is theirs alike.
OURS = ("Lion", "LAMB", "LaProp")
RULES = [case for case in CASES if (case.torchs or case.name in OURS) and not case.sparse]
SEEDS = st.integers(0, 1 << 16)
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.complex64: 1e-4, torch.bfloat16: 4e-2}
LEAST = {torch.float64: 1e-7, torch.float32: 1e-5, torch.complex64: 1e-5, torch.bfloat16: 2e-2}

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
        one = case.ours(case.parameters(), backend="eager")
        counted = frozenset({"step", COUNT, *one.scalar_state_names(one.param_groups[0])})
        drawn = [values(draw, draw.choice(shapes), dtype) for _ in range(count)]
        for i, make in enumerate(makers):
            params = [Parameter(value.clone()) for value in drawn]
            groups: list[Any] = [{"params": params[:cut]}]
            if cut < count:
                groups.append({"params": params[cut:], "lr": 0.05})
            self.sides.append(Side(make, groups, Memory(remembers) if i == 0 else None, shapes, counted))

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
            if not (refused(raised[0]) or self.may_raise(name, raised)):
                raise AssertionError(f"{name}: ours, torch's: {raised}") from next(filter(None, raised))
            self.recover()
        return not any(raised)

    def may_raise(self, name: str, raised: list[Exception | None]) -> bool:
        """Whether an action may have raised what it did on each side."""
        # Numbers that a step in inference mode makes are inference tensors of torch's, and ordinary ones of ours.
        return all(raised) or (raised[0] is None and "inference tensor" in str(raised[-1]))

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


def coarse(codec: Codec, near: dict[str, float], largest: float) -> dict[str, float]:
    """How far two values may be that were kept so, of which each was rounded."""
    if codec.block_size:
        # A step of the codes, of which the finest are near 0.
        return {"rtol": 0.5 if "4" in codec.name else 0.1, "atol": 1e-2}
    own = tolerance(*(torch.empty(0, dtype=dtype) for dtype in codec.dtypes))
    return {name: max(near[name], own[name]) for name in near}


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
        stateful_step_count=steps,
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


def run(machine: type[Machine], backend: str, share: float, steps: int = 50, **attributes: Any) -> None:
    """Run sequences on a backend: so much of all, and by hand of so many `steps`."""
    machine = type(f"{machine.__name__}_{backend}", (machine,), {"backend": backend, **attributes})
    if not BY_HAND:
        steps = 10 if backend == "triton" else 20
    try:
        run_state_machine_as_test(machine, settings=settings_of(share, steps))
    finally:
        if LOG:
            with open(f"{LOG}.found", "a") as file:
                file.writelines(f"{number} {text}\n" for text, number in found.most_common())
