"""Every optimizer comes to the minimum: of a parabola, and along the curved valley of Rosenbrock's function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from table import CASES, Case, rows
from torch import Tensor
from torch.nn import Parameter

import triton_optim

STEPS = 1000


class Function(NamedTuple):
    """A function of two numbers whose least value is 0: it, its derivative, where one starts, and what is near 0."""

    value: Callable[[Any, Any], Any]
    slope: Callable[[float, float], list[float]]
    start: tuple[float, float]
    near: float


FUNCTIONS = {
    "parabola": Function(
        lambda x, y: (x - 1) ** 2 + 10 * (y + 2) ** 2, lambda x, y: [2 * (x - 1), 20 * (y + 2)], (3.0, 1.0), 1e-3
    ),
    "Rosenbrock's": Function(
        lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
        lambda x, y: [-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)],
        (-1.2, 1.0),
        0.05,
    ),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@each_function
def test_the_derivatives_are_right(function: Function) -> None:
    point = torch.tensor(function.start, dtype=torch.float64, requires_grad=True)
    function.value(*point).backward()
    assert point.grad is not None
    assert point.grad.tolist() == pytest.approx(function.slope(*function.start))
    assert function.value(*function.start) > 100 * function.near


@rows(*(case for case in CASES if case.minimizes))
def test_every_optimizer_comes_to_the_minimum(case: Case) -> None:
    """Of both functions at once, each of a parameter of its own. The rate falls to 0 meanwhile: some take steps as long
    as the rate, however near the minimum is.
    """
    params = [Parameter(torch.tensor([function.start])) for function in FUNCTIONS.values()]  # all take matrices
    optimizer = case.ours(params, **case.minimizes, backend="eager")
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = case.minimizes["lr"] * (1 - step / STEPS)
        for p, function in zip(params, FUNCTIONS.values(), strict=True):
            gradient = torch.tensor([function.slope(*p.tolist()[0])])
            p.grad = gradient.to_sparse(1) if case.sparse else gradient
        optimizer.step()
    for p, (name, function) in zip(params, FUNCTIONS.items(), strict=True):
        assert function.value(*p.tolist()[0]) < function.near, name


@each_function
@pytest.mark.parametrize(
    "make",
    [
        lambda p: triton_optim.LBFGS([p], max_iter=50, line_search_fn="strong_wolfe"),
        lambda p: triton_optim.NonlinearCG([p], max_iter=50),
    ],
    ids=["LBFGS", "NonlinearCG"],
)
def test_those_that_take_a_closure_come_to_the_minimum(make: Callable[[Tensor], Any], function: Function) -> None:
    p = Parameter(torch.tensor(function.start, dtype=torch.float64))
    optimizer = make(p)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = function.value(*p)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert function.value(*p.tolist()) < 1e-6 * function.near
