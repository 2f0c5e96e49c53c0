"""One optimizer on one model, beside its peers: whether they agree, and how long a step of each takes."""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.explain import explain
from ..core.memory import state_bytes
from ..core.optimizer import RuleOptimizer
from ..options import OPTIONS
from ..util import gather
from ..util.table import short
from .agreement import Contender, Difference, differences
from .measure import Measurement, Side, measure
from .models import Shapes, elements, parameters
from .peers import (
    CODES_OF_4_BITS,
    CODES_OF_8_BITS,
    Unavailable,
    allowed_share,
    first_line,
    peer_optimizer,
    start_training,
)
from .records import Record

# What differs from the defaults of a class, so that all parts of the update are at work. A step is as large as a tenth
# of a weight where the default leaves that open: smaller ones are lost in 16 bits, and a wrong one is then not noticed.
SETTINGS: dict[str, dict[str, Any]] = {
    "Adadelta": {"lr": 100.0, "weight_decay": 0.1},
    **{name: {"lr": 0.1, "weight_decay": 0.1} for name in ("AdamW", "Lion")},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    # They find the rate, from one that is no less.
    **{name: {"d0": 0.1} for name in ("Prodigy", "DAdaptAdam", "DAdaptLion", "DAdaptSGD")},
    "ScheduleFreeRAdam": {"lr": 0.1, "silent_sgd_phase": False},  # else it stands still in its first steps
}
OTHERS = {"lr": 0.1}

# Of optimizers that torch computes in another precision: its Muon iterates in bfloat16, 1.2 % off for random matrices.
# Two results in bfloat16 differ by 2.4 %.
OPTIMIZER_SHARES = {"Muon": 3e-2}

# Of the states of ours, as the peers' codes; in bfloat16, with stochastic rounding, results were 0.12 % off at most.
STATE_SHARES: dict[Any, float] = {"int8": CODES_OF_8_BITS, "int4": CODES_OF_4_BITS, torch.bfloat16: 0.01}


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        optimizer: one of this package's classes, or a user's.
        model: its name.
        shapes: of its parameters, or of those of them that fit.
        dtype: of the parameters and gradients.
        device: where.
        options: ``state_dtype`` and ``param_precision``.
        settings: hyperparameters; by default those of `SETTINGS`.
        cut: how the model was cut down, in words; empty if it was not.
        label: of the optimizer with these settings; empty for its name.
    """

    optimizer: type[RuleOptimizer]
    model: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    cut: str = ""
    label: str = ""

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """What differs from the defaults of the class."""
        return SETTINGS.get(self.optimizer.__name__, OTHERS) if self.settings is None else self.settings

    @property
    def name(self) -> str:
        """The case in words."""
        dtype = "" if self.dtype == torch.float32 else f", {short(self.dtype)}"
        chosen = {name: value for name, value in self.options.items() if value not in (None, OPTIONS[name])}
        codecs = "".join(f", {name}={short(value)}" for name, value in chosen.items())
        return f"{self.label or self.optimizer.__name__}, {self.model} ({len(self.shapes)} tensors){dtype}{codecs}"


@dataclass(frozen=True)
class Row:
    """A side of a comparison: a time, or the reason why there is none.

    Attributes:
        side: its name.
        reason: why it was not timed; empty if it was.
        seconds: the median time of a step.
        ratio: of our time to this side's, and its lowest and highest value in a single round; None for ours.
        state_bytes: what it keeps for a parameter.
        difference: of its results from ours; None for ours.
    """

    side: str
    reason: str = ""
    seconds: float | None = None
    ratio: tuple[float, float, float] | None = None
    state_bytes: float | None = None
    difference: Difference | None = None


@dataclass
class Comparison:
    """What was found: a row for each side, and the samples."""

    case: Case
    rows: list[Row]
    contenders: list[Contender]
    backends: list[str]  # that run ours
    measurement: Measurement | None = None

    @property
    def disagreeing(self) -> list[str]:
        """The peers whose results are others than ours."""
        return [r.side for r in self.rows if r.difference and not r.difference.error and not r.difference.same]

    def beside(self, peers: Sequence[str] | None = None) -> tuple[dict[str, Any], str] | None:
        """Ours beside the fastest of the peers that were timed, or of these of them; None where there is none."""
        timed = [r.side for r in self.rows if r.ratio is not None and (r.side in peers if peers else True)]
        return self.measurement.compared("ours", timed) if timed and self.measurement else None

    @property
    def figures(self) -> dict[str, Any]:
        """Numbers by name, as the results keep them."""
        found: dict[str, Any] = {f"{r.side} ms": 1e3 * r.seconds for r in self.rows if r.seconds is not None}
        found["ours runs on"] = self.backends
        found["parameters"] = elements(self.case.shapes)
        for row in self.rows:
            if row.state_bytes is not None:
                found[f"{row.side} bytes of state a parameter"] = row.state_bytes
            if row.ratio is not None:
                found[f"ours over {row.side}"] = dict(zip(("ratio", "lowest", "highest"), row.ratio, strict=True))
            if row.difference is not None and not row.difference.error:
                found[f"{row.side} differs by"] = row.difference.share
        return found | {"absent": {row.side: row.reason for row in self.rows if row.reason}}

    @property
    def text(self) -> str:
        """Times and reasons in words."""
        return ", ".join(
            f"{row.side}: {row.reason}" if row.seconds is None else f"{row.side} {1e3 * row.seconds:.2f} ms"
            for row in self.rows
        )

    def record(self, question: str) -> Record:
        """The answer, to be written to a file."""
        text = "; ".join(filter(None, [self.text, self.case.cut]))
        return Record(question, self.case.name, text, self.figures, measurement=self.measurement)


def settle(contenders: Sequence[Contender]) -> None:
    """Bring steps to where they are in a training that has gone on for a while, and nothing is compiled beside it."""
    gather.library.load()
    for c in contenders:
        if len(c.params) >= gather.WORTHWHILE:
            for _ in range(gather.STEPS):
                c.step()


def compare(
    case: Case,
    peers: Sequence[str],
    backends: Sequence[str] = ("auto",),
    *,
    patience: float,
    rounds: int = 10,
    inner: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Build all sides, compare their results, and time those that agree with the first backend of ours in turns.

    Raises:
        Unavailable: ours cannot be constructed, or its step fails.
    """
    gc.collect()
    contenders, reasons = entrants(case, peers, backends)
    if not contenders:
        raise Unavailable("; ".join(dict.fromkeys(reasons.values())))
    first = contenders[0]
    try:
        found = differences(contenders)
    except RuntimeError as error:  # not enough memory, or a compiler that fails
        raise Unavailable(first_line(error)) from error
    reasons |= {name: d.reason() for name, d in found.items() if not d.same}
    assert isinstance(first.optimizer, RuleOptimizer)
    used = sorted({bucket.backend for bucket in explain(first.optimizer)})
    states = {c.name: state_bytes(c.optimizer) / sum(p.numel() for p in c.params) for c in contenders}
    contenders = [c for c in contenders if c.name not in reasons]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages
        settle([c for c in contenders if isinstance(c.optimizer, RuleOptimizer)])
        sides = [Side(c.name, c.step) for c in contenders]
        m = measure(sides, patience, device=case.device, rounds=rounds, inner=inner, advance=advance)

    def row(name: str) -> Row:
        if name in reasons:
            return Row(name, reasons[name], difference=found.get(name))
        ratio = None if name == first.name else (m.ratio(first.name, name), *m.ratio_range(first.name, name))
        return Row(name, "", m.median(name), ratio, states[name], found.get(name))

    return Comparison(case, [row(name) for name in [*our_names(backends), *peers]], contenders, used, m)


def our_names(backends: Sequence[str]) -> list[str]:
    """The sides of this package, one a backend; the first is ``ours``."""
    return ["ours", *(f"ours, {backend}" for backend in backends[1:])]


def entrants(case: Case, peers: Sequence[str], backends: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """All sides that can be constructed, ours first, and the reasons of the others."""
    contenders, reasons = [], {}
    own_shares = [STATE_SHARES.get(case.options.get("state_dtype")), OPTIMIZER_SHARES.get(case.optimizer.__name__)]
    share = max(filter(None, own_shares), default=None)
    for name, backend in zip(our_names(backends), backends, strict=True):
        params = list(parameters(case.shapes, case.device, case.dtype))
        try:
            settings: dict[str, Any] = {**case.hyperparameters, **case.options, "backend": backend}
            own = case.optimizer(params, **settings)
            start_training(own)
            explain(own)  # says what the first step would
        except Exception as error:  # a user's optimizer may raise anything
            reasons[name] = first_line(error)
            continue
        contenders.append(Contender(name, own, params, own.step, share))
    if not contenders or contenders[0].name != "ours":
        return [], reasons
    group = contenders[0].optimizer.param_groups[0]
    arguments = inspect.signature(case.optimizer).parameters
    hyperparameters = {name: group[name] for name in arguments if name in group and name not in {*OPTIONS, "params"}}
    for name in peers:
        params = list(parameters(case.shapes, case.device, case.dtype))
        try:
            made, step = peer_optimizer(name, case.optimizer.__name__, params, hyperparameters)
        except Unavailable as reason:
            reasons[name] = str(reason)
            continue
        contenders.append(Contender(name, made, params, step, allowed_share(name)))
    return contenders, reasons
