"""What there is to choose from: of optimizers and wrappers the kind, what they keep and move, the paper and the use.

Nothing of it is typed here: kinds and bytes are computed from the classes, paper and use stand in their docstrings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from .backends.costs import cost
from .core.memory import memory_report, state_bytes
from .core.optimizer import RuleOptimizer
from .core.two_places import TwoPlaces
from .dispatch import Choice
from .engine.entries import entries_of, sort_params
from .optimizers.adam import AdamW
from .registry import optimizers, wrappers
from .spec import Variant

# What an optimizer may be, and how it is said.
KINDS = {
    "elementwise": "elementwise",
    "parameter": "sums over a parameter",
    "model": "sums over the model",
    "rows": "rows and columns",
    "matrices": "matrices",
    "closure": "calls the closure",
    "sparse": "sparse gradients",
    "eval": "train() and eval()",
}
SIDE = 1024
LATER = 101  # the step of which costs are told
ABOUT = f"""\
state: bytes kept of each element of a float32 matrix of {SIDE:,} x {SIDE:,}, with the defaults of the class.
step: bytes that a Triton step of that matrix reads and writes, beside AdamW's. It is computed (backends/costs.py), not
measured. A kernel reads the gradient, the parameter and every state, and writes all but the gradient; sums over
parameters read what they need of it once more; what rows or matrices need before the kernel is counted operation by
operation, in float32. Products of matrices take most of the time where there are any: so many multiplications and
additions an element, decompositions not counted. What is not done in every step counts by its share. A step of sparse
gradients is counted for the elements that they hold. What a closure costs is up to the model. A wrapper is shown around
AdamW: the state that it adds, and the step of both."""


@dataclass(frozen=True)
class Entry:
    """An optimizer, or AdamW within a wrapper.

    Attributes:
        name: the class's, or the wrapper's.
        kinds: which of ``KINDS`` it is.
        wrapper: whether it is a function on optimizers; then states and bytes are those that it adds to AdamW's.
        states: bytes of each state, an element.
        launches: kernels of a step with Triton, or torch operations; None where the closure decides.
        moved: bytes a step reads and writes, an element; None where the closure decides.
        products: multiplications and additions of products of matrices, an element.
        paper: who published it, and when.
        url: where.
        use: what it is for.
    """

    name: str
    kinds: tuple[str, ...]
    wrapper: bool
    states: dict[str, float]
    launches: int | None
    moved: float | None
    products: float
    paper: str
    url: str
    use: str

    @property
    def kind(self) -> str:
        """Its kinds in words."""
        return ", ".join(KINDS[kind] for kind in self.kinds)

    @property
    def state(self) -> str:
        """Bytes of state an element."""
        total = sum(self.states.values())
        return f"{total:.2g}" if total < 10 else f"{total:.0f}"

    @property
    def beside_adamw(self) -> float | None:
        """What a step moves, as a multiple of what AdamW's moves."""
        return None if self.moved is None else self.moved / bytes_of_adamw()

    @property
    def step(self) -> str:
        """The same in words, with the products."""
        share = "-" if self.beside_adamw is None else f"{self.beside_adamw:.2g}"
        return f"{share}, {self.products:,.0f} operations" if self.products else share

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**vars(self), "state": sum(self.states.values()), "beside_adamw": self.beside_adamw}


def entries(classes: Iterable[type[Optimizer]] | None = None) -> list[Entry]:
    """Optimizers by their names, all that the package exports unless others are given, and then its wrappers."""
    chosen = optimizers().values() if classes is None else classes
    found: list[Any] = sorted(chosen, key=lambda cls: cls.__name__.lower())
    return [*(entry(cls) for cls in found), *(wrapper_entry(name, wrapper) for name, wrapper in wrappers().items())]


@cache
def entry(cls: type[Optimizer]) -> Entry:
    """What there is to know of a class."""
    said = (*source_of(cls), paragraph(cls, "For"))
    if not issubclass(cls, RuleOptimizer):
        return Entry(cls.__name__, ("closure",), False, states_with_closure(cls), None, None, 0.0, *said)
    own: Any = cls
    p = nn.Parameter(torch.empty(SIDE, SIDE, device="meta"))
    optimizer = own([p])
    ((key, slots),) = sort_params(optimizer, entries_of(optimizer, [p], [None], every=True)).items()
    if not key.sparse:
        key = key._replace(choice=Choice("triton", "to be computed"))
    # Not of the first steps, and of one in which bases or roots are found only its share.
    cycle = range(LATER, LATER + optimizer.param_groups[0].get("precondition_frequency", 1))
    with FlopCounterMode(display=False) as counter:
        costs = [cost(optimizer, key, slots, step) for step in cycle]
    launches, moved = round(fmean(n for n, _ in costs)), fmean(nbytes for _, nbytes in costs)
    products = counter.get_total_flops() / p.numel() / len(costs)
    kinds = kinds_of(cls, key.variant, products)
    states = {name: nbytes / p.numel() for name, nbytes in memory_report(optimizer).states.items()}
    return Entry(cls.__name__, kinds, False, states, launches, moved, products, *said)


@cache
def wrapper_entry(name: str, wrapper: Callable[[Any], Any]) -> Entry:
    """What a wrapper adds to AdamW."""
    plain, within = entry(AdamW), entry(wrapper(AdamW))
    states = {state: size for state, size in within.states.items() if state not in plain.states}
    paper, url = source_of(wrapper)
    use = paragraph(wrapper, "For")
    return replace(within, name=name, wrapper=True, states=states, paper=paper, url=url, use=use)


def kinds_of(cls: type[RuleOptimizer], variant: Variant, products: float) -> tuple[str, ...]:
    """Which of ``KINDS`` a class is, in the way in which it runs by default, whose step multiplies matrices or not."""
    whole = cls.total is not RuleOptimizer.total
    found = {
        "matrices": products > 0,
        "rows": variant.prologue and not products,
        "model": variant.measures and whole,
        "parameter": variant.measures and not whole,
        "sparse": not cls.takes_dense_gradients,
    }
    kinds = [kind for kind, is_one in found.items() if is_one] or ["elementwise"]
    return tuple(kinds + ["eval"] * issubclass(cls, TwoPlaces))


def bytes_of_adamw() -> float:
    """An element, a step."""
    moved = entry(AdamW).moved
    assert moved is not None
    return moved


def states_with_closure(cls: type[Optimizer]) -> dict[str, float]:
    """Bytes of state an element of a class that calls the closure: found in a run, after more iterations than a history
    holds.
    """
    p, own = nn.Parameter(torch.linspace(-1.2, 1.0, SIDE, device="cpu")), cast(Any, cls)
    searches = {"line_search_fn": "strong_wolfe"} if "line_search_fn" in inspect.signature(cls).parameters else {}
    optimizer = own([p], max_iter=150, max_eval=1000, **searches)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((1 - p[:-1]).square() + 100 * (p[1:] - p[:-1].square()).square()).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return {"all": state_bytes(optimizer) / SIDE}


def paragraph(thing: Any, label: str) -> str:
    """What follows a label in a docstring, in one line; empty where there is none, as with ``python -OO``."""
    match = re.search(rf"^{label}: (.*?)(?:\n\n|\Z)", inspect.getdoc(thing) or "", re.M | re.S)
    return " ".join(match[1].split()) if match else ""


def source_of(thing: Any) -> tuple[str, str]:
    """Who published it and when, and where: the first that the docstring names."""
    first = paragraph(thing, "Source").partition("; ")[0]
    who, url = re.match(r"[^:]*? \d{4}\b", first), re.search(r"https://[^\s,;]+", first)
    return who[0] if who else first.partition(",")[0], url[0].rstrip(".") if url else ""
