"""As test_state_machine.py: ours with its own options, beside an eager optimizer that is made anew from the state.

It runs whatever the package has, also within wrappers. After a copy all is as it was before. Some sequences of each:

    TRITON_OPTIM_FUZZ=2000 pytest -n 0 tests/test_state_machine_twin.py -k SOAP
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import compress
from typing import Any

import pytest
import torch
from conftest import CPP, TRITON
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from state_machine import (
    BY_HAND,
    BY_NAME,
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
from table import CASES, Case
from torch import Tensor
from torch.nn import Parameter
from user_actions_on_groups import COPIES
from user_sides import Side, equal

import triton_optim as to
from triton_optim.core.saved_form import names_of, saved_states
from triton_optim.precision import codecs
from triton_optim.precision.averaging import value_of
from triton_optim.precision.codecs import part_names, read
from triton_optim.precision.kept import current_codec, current_parameter_codec


def wrapped(name: str, wrapper: Callable[[Any], Any], **options: Any) -> Case:
    """The row of an optimizer within a wrapper."""
    case = BY_NAME[name]
    return replace(case, ours=wrapper(case.ours), variants={}, settings=case.settings | options, elementwise=False)


WRAPPED = [
    wrapped("AdamW", to.cautious),
    wrapped("Lion", to.clip_update, clip_threshold=0.3),
    wrapped("Adam", to.decoupled_decay, decay_by="independent"),
    wrapped("ADOPT", to.cautious_decay),
    wrapped("RMSprop", to.nesterov),
    wrapped("SGD", to.lookahead, lookahead_steps=2),
    wrapped("LAMB", to.lookahead, lookahead_steps=3),
    wrapped("ScheduleFreeAdamW", to.centralized),
    wrapped("NorMuon", lambda base: to.lookahead(to.centralized(base)), lookahead_steps=2),
]
PRECISIONS = ("storage", "stochastic", "kahan", "split24", "split32", "master")
DTYPES = (None, torch.float32, torch.bfloat16, "int8", "int4")
# What a group, or the optimizer, may come to have between steps.
EDITS: dict[str, Any] = {
    "state_dtype": DTYPES,
    "param_precision": PRECISIONS,
    "ema_decay": (None, 0.9, 0.5),
    "ema_dtype": (None, torch.float32, torch.bfloat16),
    "offload": (None, "cpu"),
    "capturable": (False, True),
    "max_grad_norm": (None, 0.5, 3.0),
    "amp": (None, "fused"),
}
SHAPES = ((20, 16), (300,), (4, 3), (), (0,), (64,), (0, 3), (6, 20))


class BesideATwin(Machine):
    """Options that torch has none of: beside an eager optimizer that is made anew from the state before each step."""

    # A copy is not tied; and a new optimizer takes no parameter twice, and none of another dtype with this precision.
    left_out = ("tied_data", "states_tied", "listed_twice", "cast", "data_of_another_dtype")
    cases = (*CASES, *WRAPPED)

    @initialize(data=st.data(), seed=SEEDS, remembers=st.booleans())
    def start(self, data: Any, seed: int, remembers: bool) -> None:
        case = data.draw(st.sampled_from(self.cases))
        precision, kept = data.draw(st.sampled_from(PRECISIONS)), data.draw(st.sampled_from(DTYPES))
        whole = data.draw(st.fixed_dictionaries({}, optional=WHOLE))
        # Each variant is another kernel to compile.
        variant = case.variants[data.draw(st.sampled_from(sorted(case.variants)))] if BY_HAND and case.variants else {}
        options, dtype = self.drawn(case, precision, kept, variant | whole)
        if BY_HAND and dtype == torch.float32:
            complex = case.complex and self.backend in ("eager", "auto")
            dtype = data.draw(st.sampled_from([dtype, torch.float64] + [torch.complex64] * complex))
            options |= {"state_dtype": None} if dtype.is_complex else {}
        self.begin(case, options, dtype, seed, remembers)

    @classmethod
    def drawn(cls, case: Case, precision: str, kept: Any, whole: dict[str, Any]) -> tuple[dict[str, Any], torch.dtype]:
        options = case.settings | {"lr": 0.1, "param_precision": precision, "state_dtype": kept, "seed": 5} | whole
        if "ema_decay" not in options:
            options.pop("ema_dtype", None)
        if case.sparse:
            precision, options = "storage", {name: options[name] for name in ("lr", "max_grad_norm") if name in options}
        if cls.backend == "triton":
            options.pop("offload", None)
        if "offload" in options:
            options.pop("capturable", None)
        error = attempt(lambda: case.ours([Parameter(torch.zeros(4, 4))], **options))
        if "state_dtype" in str(error):  # which some refuse
            options["state_dtype"] = None
        return options, torch.float32 if precision == "storage" else torch.bfloat16

    def makers(self, case: Case, options: dict[str, Any]) -> list[Callable[[Any], Any]]:
        self.chosen = options
        empty = any(0 in shape for shape in case.shapes)
        fits = [
            (len(s) == 2 or not case.matrices) and (s or () in case.shapes) and (empty or 0 not in s) for s in SHAPES
        ]
        self.shapes = tuple(compress(SHAPES, fits))
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
        for group in groups:
            group |= {name: value for name, value in PLAIN.items() if name in group}
        own = {name: getattr(ours.opt, name) for name in ("max_grad_norm", "amp")}
        twin = self.case.ours(groups, **{**self.chosen, **PLAIN, **own}, backend="eager")
        saved = [{**group, "params": list(group["params"])} for group in groups]
        numbers = iter(range(len(ours.params)))
        for group in saved:
            group["params"] = [next(numbers) for _ in group["params"]]
        kept = dict(zip(ours.opt.state, saved_states(ours.opt, ours.opt.state), strict=True))
        states = {i: kept[p] for i, p in enumerate(ours.params) if p in kept}
        twin.load_state_dict(copy.deepcopy({"state": states, "param_groups": saved}))
        return twin, [copies[id(p)] for p in ours.params]

    def step(self, how: str = "step") -> None:
        if not self.case.sparse:
            self.step_of_both(how)
            return
        for p in self.sides[0].params:
            g, p.grad = p.grad, None
            if g is not None and g.dim():
                kept = torch.arange(len(g)) % 3 > 0
                p.grad = (g.clone() * kept.view(-1, *[1] * (g.dim() - 1))).to_sparse(1)
        self.step_of_both(how)
        self.sides[0].opt.zero_grad()

    def step_of_both(self, how: str) -> None:
        ours = self.sides[0]
        self.log(f"step {how}")
        before = snapshot(ours)
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in ours.params]
        unmade = None
        try:
            twin, copies = self.twin()
        except Exception as error:
            unmade = error
        scaled = ours.opt.amp and random.Random(str(before[0][:1])).random() < 0.7
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
            found[f"the twin raises: {type(other).__name__}: {re.sub('[0-9]+', 'N', str(other))[:250]}"] += 1
            if refused(other):  # a state of which a part is gone steps, and cannot be loaded
                return
            raise AssertionError(f"the twin raised: {other!r}") from other
        for i, (g, was) in enumerate(zip([p.grad for p in ours.params], gradients, strict=True)):
            assert (g is None) == (was is None), f"the gradient of parameter {i} came or went"
            assert g is None or equal(g.to_dense(), was.to_dense()), f"the step wrote the gradient of parameter {i}"
        ours.memory.check([*ours.params, *(value for _, _, value in ours.states())])
        for i, (p, q) in enumerate(zip(ours.params, copies, strict=True)):
            self.assert_alike(i, self.decoded(ours.opt, p), self.decoded(twin, q), "the twin's")

    def decoded(self, opt: Any, p: Parameter) -> dict[str, tuple[Tensor, dict[str, float]]]:
        """The values of a parameter and its states, and how far they may be from the twin's."""
        state, names = opt.state.get(p, {}), names_of(opt)
        near = tolerance(p, p.grad)
        values = {"value": (p.detach(), near)}
        if part_names(current_parameter_codec(state, p), None):
            values["exact value"] = (value_of(state, p), CORRECTED)
        for name, held in state.items():
            codec = current_codec(opt, state, name) if name in names.elementwise else None
            if codec is not None:
                parts = [held, *(state[part] for part in part_names(codec, name))]
                largest = float(held.abs().max()) if held.numel() else 0.0
                values[name] = (read(codec, parts, p), coarse(codec, near, largest))
            elif name in names.numbers or name in opt.kept_names:
                values[name] = (torch.as_tensor(held), near if name in opt.kept_names else tolerance(torch.empty(0)))
        return values

    def table(self, table: dict[str, Any], name: str, seed: int) -> None:
        self.copied = self.all_decoded() if table is COPIES and name != "resumed" else None
        super().table(table, name, seed)

    def all_decoded(self) -> Any:
        """Of all parameters; None where a state can't be read."""
        ours, found = self.sides[0], []
        error = attempt(lambda: found.extend(self.decoded(ours.opt, p) for p in ours.params))
        return (
            None
            if error is not None
            else [{name: (value.clone(), near) for name, (value, near) in values.items()} for values in found]
        )

    def compare(self, loaded: bool = False) -> None:
        """A copy has all that was copied."""
        if self.copied is None:
            return
        for i, (before, p) in enumerate(zip(self.copied, self.sides[0].params, strict=True)):
            self.assert_alike(i, self.decoded(self.sides[0].opt, p), before, "the original")

    @staticmethod
    def assert_alike(i: int, mine: Any, theirs: Any, whose: str) -> None:
        assert set(mine) == set(theirs), f"parameter {i} has {sorted(mine)}, {whose} {sorted(theirs)}"
        for name, (value, near) in theirs.items():
            assert_near(mine[name][0], value, near, f"{name} of parameter {i}", whose)

    @rule(name=st.sampled_from(sorted(EDITS)), seed=SEEDS)
    def kept_otherwise(self, name: str, seed: int) -> None:
        """Another value of an option of ours."""

        def edit(side: Side, draw: random.Random) -> None:
            value = draw.choice(EDITS[name])
            if name in ("max_grad_norm", "amp"):
                setattr(side.opt, name, value)
            else:
                group = draw.choice(side.groups)
                group |= PLAIN if name in PLAIN else {}  # which exclude each other
                group[name] = value

        self.do(edit, seed, f"edit {name}")

    @rule(seed=SEEDS)
    def warmed_up(self, seed: int) -> None:
        before = snapshot(self.sides[0])
        if self.do(lambda side, _: side.opt.warmup(), seed, "warmup"):
            assert_unchanged(before, snapshot(self.sides[0]), "no step, but was warmed up")

    @rule(seed=SEEDS, name=st.sampled_from((None, *sorted(COPIES))))
    def evaluated(self, seed: int, name: str | None) -> None:
        """Evaluation, in which a copy may be made."""
        if self.do(lambda side, _: side.opt.eval(), seed, "eval") and name is not None:
            self.table(COPIES, name, seed)
        self.do(lambda side, _: side.opt.train(), seed, "train")

    def may_raise(self, name: str, raised: list[Exception | None]) -> bool:
        # The state of a parameter that was removed has no number, neither of torch's.
        return name not in (*COPIES, "eval", "train") or isinstance(raised[0], KeyError)

    def recover(self) -> None:
        ours = self.sides[0]
        restart(ours)
        ours.opt.train()
        for group in ours.groups:
            for name in EDITS:
                if name in group and name not in ours.opt.defaults:
                    del group[name]


CORRECTED = {"rtol": 1e-3, "atol": 1e-3}
WHOLE: Any = {
    "ema_decay": st.just(0.9),
    "ema_dtype": st.sampled_from((torch.float32, torch.bfloat16)),
    "max_grad_norm": st.just(0.5),
    "amp": st.just("fused"),
    "offload": st.just("cpu"),
    "capturable": st.just(True),
}
# What of it the twin has not.
PLAIN = {"offload": None, "capturable": False}


def assert_near(mine: Tensor, value: Tensor, near: dict[str, float], what: str, whose: str) -> None:
    assert mine.shape == value.shape, f"{what} has shape {mine.shape}, {whose} {value.shape}"
    wide = torch.complex128 if value.is_complex() else torch.float64
    a, b = mine.detach().to(wide), value.detach().to(wide)
    assert torch.allclose(a, b, **near, equal_nan=True), f"{what}: {a}, {whose} {b}"


SOME = [case for case in BesideATwin.cases if not case.sparse] if BY_HAND else [BY_NAME["AdamW"]]


@pytest.mark.parametrize(
    ("backend", "share", "cases"),
    [
        pytest.param("auto", 0.07, SOME, marks=CPP),
        pytest.param("compiled", 0.03, SOME),
        pytest.param("triton", 0.02, SOME, marks=TRITON),
        *(
            pytest.param(backend, 0.01, [case], marks=[CPP] * (backend == "auto"), id=f"{backend}-{case.name}")
            for backend in ("eager", "auto", "compiled")
            for case in BesideATwin.cases
            if BY_HAND and not (case.sparse and backend == "compiled")
        ),
    ],
)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_beside_a_twin(backend: str, share: float, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MIN_QUANTIZED_NUMEL", 64)
    run(BesideATwin, backend, share, steps=20, cases=cases)
