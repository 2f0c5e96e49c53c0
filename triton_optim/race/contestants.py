"""The optimizers of a race: names, options, parameter groups, learning rates."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim import Optimizer

import triton_optim

from ..registry import optimizers, rule_optimizers
from .names import RaceError, resolve
from .settings import SETTINGS, Setting
from .task import Task

GRID = (1 / 3, 1.0, 3.0)  # of the usual learning rate, where none is given
ALL = "all"  # the name that stands for every optimizer here that any task can be given to
OwnOptimizer = Callable[..., Optimizer]


def muon_groups(task: Task, lr: float, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Muon's groups, and AdamW's with the same learning rate."""
    shared = {name: options[name] for name in ("weight_decay",) if name in options}
    return triton_optim.muon_param_groups(task.model, task.heads, {"lr": lr, **shared})


def is_for_matrices(build: OwnOptimizer) -> bool:
    """Whether it takes matrices in one group and all else in another, as Muon and what is made of it."""
    return isinstance(build, type) and issubclass(build, triton_optim.Muon)


def estimates_hessian(build: OwnOptimizer) -> bool:
    """Whether it is SophiaG, or made of it."""
    return isinstance(build, type) and issubclass(build, triton_optim.SophiaG)


# Options that optimizers have in a race unless told otherwise.
OPTIONS: dict[OwnOptimizer, dict[str, Any]] = {
    triton_optim.Muon: {"adjust_lr_fn": "match_rms_adamw"}  # one learning rate fits both kinds of groups
}


@dataclass(frozen=True)
class Contestant:
    """An optimizer that takes part.

    Attributes:
        label: how it is called in tables and pictures.
        build: its class, or what takes parameters and ``lr`` and gives an optimizer.
        options: its other keywords.
        lrs: the learning rates to try; empty leaves them to the race.
        start: where it begins, see `starting`.
    """

    label: str
    build: OwnOptimizer
    options: Mapping[str, Any] = field(default_factory=dict)
    lrs: tuple[float, ...] = ()
    start: Setting | None = None

    def starting(self, task: Task, published: bool) -> Contestant:
        """The same contestant, with where it begins: at the learning rate that is usual on the task, else at one that
        was published, else at the default of its class.

        Args:
            task: on which it races.
            published: with the options that were published, too, and at their learning rate.
        """
        found = SETTINGS.get(self.name)
        if published and found is not None:
            start = found
        elif self.name in task.lrs and not published:
            start = Setting(task.lrs[self.name], {}, "usual on this task")
        elif found is not None:
            start = found._replace(options={})
        else:
            start = Setting(self.default_lr, {}, "the default of its class, as no published setting is known")
        return replace(self, start=start)

    @property
    def name(self) -> str:
        """Its name among the optimizers of this package and torch; empty of others."""
        ours = getattr(self.build, "__module__", "").startswith(("triton_optim.", "torch.optim."))
        return getattr(self.build, "__name__", "").lower() if ours else ""

    @property
    def all_options(self) -> dict[str, Any]:
        """Its options, those of its start among them."""
        return {**OPTIONS.get(self.build, {}), **(self.start.options if self.start else {}), **self.options}

    def remarks(self, task: Task, lrs: Iterable[float]) -> list[str]:
        """What is to be known of its settings."""
        start, said = self.start, []
        if start is not None:
            words = [] if self.lrs or tuple(lrs) else [f"lr around {start.lr:g}"]
            words += [f"{key}={value}" for key, value in start.options.items() if key not in self.options]
            said += [f"{', '.join(words)}: {start.source}"] if words else []
        if estimates_hessian(self.build) and task.sampled_loss is None:
            said.append("no Hessian is estimated, as the task has no sampled_loss: it takes the momentum's signs")
        return said

    def optimizer(self, task: Task, lr: float) -> Optimizer:
        """The optimizer of the task's model."""
        options = self.all_options
        if estimates_hessian(self.build) and task.samples is not None:
            options = {"bs": task.samples, **options}
        if is_for_matrices(self.build):
            return self.build(muon_groups(task, lr, options), lr=lr, **options)
        return self.build([p for p in task.model.parameters() if p.requires_grad], lr=lr, **options)

    @property
    def usual_lr(self) -> float:
        """The learning rate from which a search goes both ways."""
        return self.default_lr if self.start is None else self.start.lr

    @property
    def default_lr(self) -> float:
        """The learning rate that its class has, or 1e-3."""
        default = inspect.signature(self.build).parameters.get("lr")
        usual = default.default if default else None
        return float(usual) if isinstance(usual, (int, float)) and usual > 0 else 1e-3

    def grid(self, lrs: Iterable[float]) -> tuple[float, ...]:
        """The learning rates to try: its own, else `lrs`, else three around the usual one; rising."""
        around = tuple(float(f"{self.usual_lr * times:.2g}") for times in GRID)
        return tuple(sorted({*(self.lrs or tuple(lrs) or around)}))


def contestant(given: str | OwnOptimizer | Contestant, shared: Mapping[str, Any] | None = None) -> Contestant:
    """A contestant from its name, such as ``adamw``, ``mymodule:MyOptimizer`` or ``sgd(lr=(0.1, 0.3), momentum=0.9)``.

    Args:
        given: the name, with options in parentheses; or a class; or a contestant, as it is.
        shared: options of all contestants; those in the name come first.

    Raises:
        RaceError: there is no such optimizer, or the options cannot be read.
    """
    if isinstance(given, Contestant):
        return given
    if not isinstance(given, str):
        return Contestant(getattr(given, "__name__", repr(given)), given, dict(shared or {}))
    name, _, inside = given.strip().partition("(")
    name = name.strip() if ":" in name else name.strip().lower()
    build = resolve("optimizer", name, optimizers())
    options = read_options(given, f"({inside}" if inside else "()")
    lr = options.pop("lr", ())
    lrs = checked_lrs(given, lr if isinstance(lr, (tuple, list)) else (lr,))
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    label = name + (f"({said})" if said else "")
    return Contestant(label, build, {**(shared or {}), **options}, lrs)


def everyone() -> list[str]:
    """The names that `ALL` stands for: all but those for sparse gradients, and those that call the closure and take the
    loss of a batch for that of all.
    """
    return [name for name, cls in rule_optimizers().items() if cls.takes_dense_gradients]


def read_options(given: str, arguments: str) -> dict[str, Any]:
    """The keywords in parentheses: numbers, tuples, strings with quotes or without, and names as `torch.bfloat16`."""
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise RaceError(f"The options of {given!r} cannot be read. Write them as sgd(momentum=0.9,nesterov=True).")
    return {str(keyword.arg): value_of(keyword.value) for keyword in call.keywords}


def value_of(expression: ast.expr) -> Any:
    """What an expression of an option stands for; what is no literal is a dtype of torch, or text."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        text = ast.unparse(expression)
        return getattr(torch, text.removeprefix("torch."), text) if text.startswith("torch.") else text


def checked_lrs(given: str, lrs: Iterable[Any]) -> tuple[float, ...]:
    """Learning rates as numbers above 0.

    Raises:
        RaceError: one of them is none.
    """
    lrs = tuple(lrs)
    for lr in lrs:
        if not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
            raise RaceError(f"The learning rate {lr!r} of {given!r} is no number above 0. Write it as 1e-3.")
    return tuple(float(lr) for lr in lrs)


def split_names(text: str) -> list[str]:
    """Names between commas; those within parentheses belong to options.

    Example:
        >>> split_names("adamw,sgd(lr=0.1,momentum=0.9)")
        ['adamw', 'sgd(lr=0.1,momentum=0.9)']
    """
    names, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names if name.strip()]
