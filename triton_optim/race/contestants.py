"""The optimizers of a race: names, options, parameter groups, learning rates."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

import triton_optim

from ..registry import optimizers
from .names import RaceError, resolve
from .task import Task

# Where a search for the learning rate begins: between the best ones on digits and charlm. Others, and users' own, begin
# at the default of their class.
USUAL_LR = {
    "lion": 5e-3,
    "muon": 1e-2,
    **dict.fromkeys(("adam", "adamw", "nadam", "rmsprop"), 1.5e-2),
    "adamax": 3e-2,
    **dict.fromkeys(("adafactor", "adagrad", "radam"), 0.1),
    **dict.fromkeys(("sgd", "asgd"), 0.3),
}
GRID = (1 / 3, 1.0, 3.0)  # of the usual learning rate, where none is given
OwnOptimizer = Callable[..., Optimizer]


def muon_groups(task: Task, lr: float, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Muon's groups, and AdamW's with the same learning rate."""
    shared = {name: options[name] for name in ("weight_decay",) if name in options}
    return triton_optim.muon_param_groups(task.model, task.heads, {"lr": lr, **shared})


def is_for_matrices(build: OwnOptimizer) -> bool:
    """Whether it takes matrices in one group and all else in another, as Muon and what is made of it."""
    return isinstance(build, type) and issubclass(build, triton_optim.Muon)


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
    """

    label: str
    build: OwnOptimizer
    options: Mapping[str, Any] = field(default_factory=dict)
    lrs: tuple[float, ...] = ()

    def optimizer(self, task: Task, lr: float) -> Optimizer:
        """The optimizer of the task's model."""
        options = {**OPTIONS.get(self.build, {}), **self.options}
        if is_for_matrices(self.build):
            return self.build(muon_groups(task, lr, options), lr=lr, **options)
        return self.build([p for p in task.model.parameters() if p.requires_grad], lr=lr, **options)

    @property
    def usual_lr(self) -> float:
        """The learning rate from which a search goes both ways."""
        module = getattr(self.build, "__module__", "")
        name = getattr(self.build, "__name__", "").lower()
        if module.startswith(("triton_optim.", "torch.optim.")) and name in USUAL_LR:
            return USUAL_LR[name]
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
