"""The ways of an optimizer on two test functions, beside SGD's and AdamW's, as a picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from math import cos, inf, isfinite, pi, sin, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton_optim
from triton_optim import RuleOptimizer
from triton_optim.registry import optimizers

STEPS = 80
RATES = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)  # of which the best is shown; it falls to 0 in these steps
WIDTH, HEIGHT = 340, 230
LEVELS = [10 ** (k / 2) for k in range(-3, 7)]
Points = list[tuple[float, float]]


class Function(NamedTuple):
    """A function of two numbers, with its least value 0.

    Attributes:
        title: what it is called.
        value: the function.
        slope: its gradient.
        start: where the ways begin.
        least: where the value is 0.
        box: what is shown: left, right, bottom, top.
        contour: the lines on which it has a value, given that and a number of points.
    """

    title: str
    value: Callable[[float, float], float]
    slope: Callable[[float, float], list[float]]
    start: tuple[float, float]
    least: tuple[float, float]
    box: tuple[float, float, float, float]
    contour: Callable[[float], list[Points]]


def ellipse(level: float) -> list[Points]:
    """Where the parabola has this value."""
    turns = [2 * pi * i / 60 for i in range(61)]
    return [[(1 + sqrt(level) * cos(turn), -1 + sqrt(level / 10) * sin(turn)) for turn in turns]]


def banana(level: float) -> list[Points]:
    """Where Rosenbrock's function has this value: above and below of its valley."""
    reach = sqrt(level)
    xs = [1 - reach + 2 * reach * i / 80 for i in range(81)]
    away = [sqrt(max(level - (1 - x) ** 2, 0.0) / 100) for x in xs]
    upper = [(x, x * x + d) for x, d in zip(xs, away, strict=True)]
    lower = [(x, x * x - d) for x, d in zip(xs, away, strict=True)]
    return [upper + lower[::-1]]


FUNCTIONS = (
    Function(
        "a parabola, ten times as steep one way",
        lambda x, y: (x - 1) ** 2 + 10 * (y + 1) ** 2,
        lambda x, y: [2 * (x - 1), 20 * (y + 1)],
        (-1.6, 0.6),
        (1.0, -1.0),
        (-2.2, 2.6, -2.0, 1.4),
        ellipse,
    ),
    Function(
        "Rosenbrock's valley",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
        lambda x, y: [-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)],
        (-1.2, 1.0),
        (1.0, 1.0),
        (-1.8, 1.6, -0.6, 2.4),
        banana,
    ),
)


def walked(cls: Any, function: Function, lr: float | None) -> Points:
    """Where an optimizer is after each step."""
    p = torch.nn.Parameter(torch.tensor([function.start]))  # all take a matrix
    known = inspect.signature(cls).parameters
    options: dict[str, Any] = {"backend": "eager"} if issubclass(cls, RuleOptimizer) else {}
    options |= {"weight_decay": 0.0} if "weight_decay" in known else {}
    options |= {"momentum": 0.9} if cls is triton_optim.SGD else {}
    options |= {} if lr is None else {"lr": lr}
    optimizer = cls([p], **options)

    def closure() -> Tensor:
        at = p.tolist()[0]
        gradient = torch.tensor([function.slope(*at)])
        p.grad = gradient.to_sparse(1) if cls is triton_optim.SparseAdam else gradient
        return torch.tensor(function.value(*at))

    points = [function.start]
    for step in range(STEPS):
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
        if cls is triton_optim.SophiaG and step % 10 == 0:
            closure()
            optimizer.update_hessian()
        optimizer.step(closure)
        if two_places := hasattr(optimizer, "eval"):
            optimizer.eval()
        x, y = p.tolist()[0]
        if two_places:
            optimizer.train()
        if not (isfinite(x) and isfinite(y)):
            break
        points.append((x, y))
    return points


def least(points: Points, function: Function) -> float:
    """How low the way ends; infinite where it went astray."""
    value = function.value(*points[-1])
    return value if len(points) == STEPS + 1 and isfinite(value) else inf


@cache
def best(name: str, function: Function) -> tuple[Points, float | None]:
    """The way that ends lowest, and its learning rate; None is that of the class."""
    cls = optimizers()[name.lower()]
    rates = RATES if issubclass(cls, RuleOptimizer) else (None,)
    ways = [(walked(cls, function, lr), lr) for lr in rates]
    return min(ways, key=lambda way: least(way[0], function))


def picture(name: str) -> str:
    """Both functions with the ways of three, as SVG in HTML."""
    return f'<div class="paths">{"".join(panel(function, name) for function in FUNCTIONS)}</div>'


def panel(function: Function, own: str) -> str:
    """One function: lines of equal value, the ways, and what is which."""
    parts = [line(points, function, "contour") for level in LEVELS for points in function.contour(level)]
    said = []
    for name in dict.fromkeys(("SGD", "AdamW", own)):
        points, lr = best(name, function)
        style = "own" if name == own else name.lower()
        parts.append(line(points, function, f"way {style}"))
        value = least(points, function)
        ends = f"{value:.0e}" if isfinite(value) else "astray"
        said.append(f'<span class="{style}">{name}</span> ({"" if lr is None else f"lr {lr:g}, "}to {ends})')
    x, y = place(function.least, function)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="The steps of {own} on {function.title}">'
        f'{"".join(parts)}<circle class="least" cx="{x:.1f}" cy="{y:.1f}" r="4"/></svg>'
        f"<figcaption>{function.title}: {', '.join(said)}</figcaption></figure>"
    )


def place(point: tuple[float, float], function: Function) -> tuple[float, float]:
    """Where a point is in the picture; of one that is far outside, where the border is passed."""
    x0, x1, y0, y1 = function.box
    x, y = (point[0] - x0) / (x1 - x0), (y1 - point[1]) / (y1 - y0)
    return min(max(x, -1.0), 2.0) * WIDTH, min(max(y, -1.0), 2.0) * HEIGHT


def line(points: Points, function: Function, style: str) -> str:
    """Points as a line."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point, function) for point in points))
    return f'<polyline class="{style}" points="{places}"/>'
