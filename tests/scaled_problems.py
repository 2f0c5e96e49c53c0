"""Standard problems of unconstrained minimization, and the same in other units: s f(x / c)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy
import scipy.optimize
import torch
from torch import Tensor
from torch.nn import Parameter

from triton_optim import NonlinearCG


class Problem(NamedTuple):
    """A function, where its minimization starts, and the least loss there is."""

    name: str
    loss: Callable[[Tensor], Tensor]
    start: Tensor
    least: float = 0.0


def rosenbrock(x: Tensor) -> Tensor:
    a, b = x[::2], x[1::2]
    return (100 * (b - a * a) ** 2 + (1 - a) ** 2).sum()


def beale(x: Tensor) -> Tensor:
    a, b = x
    return (1.5 - a * (1 - b)) ** 2 + (2.25 - a * (1 - b**2)) ** 2 + (2.625 - a * (1 - b**3)) ** 2


def powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    first = 100 * (b - a * a) ** 2 + (1 - a) ** 2
    second = 90 * (d - c * c) ** 2 + (1 - c) ** 2
    return first + second + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)


def quadratic(condition: float = 1e4, n: int = 20) -> Problem:
    """At its start, 0, the loss is 0 too: nothing there says in what units x is."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=random))[0]
    matrix = (basis * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ basis.T
    b = matrix @ torch.ones(n, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return 0.5 * x @ (matrix.to(x) @ x) - b.to(x) @ x

    return Problem("quadratic, condition 1e4", loss, torch.zeros(n, dtype=torch.float64), -0.5 * float(b.sum()))


def logistic_regression(samples: int = 100, n: int = 10) -> Problem:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(samples, n, dtype=torch.float64, generator=random) * torch.logspace(-1, 1, n, dtype=torch.float64)
    signs = (x @ torch.randn(n, dtype=torch.float64, generator=random) + torch.randn(samples, generator=random)).sign()
    z = x * signs[:, None]

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(z.to(w) @ w)).mean() + 1e-3 * w @ w

    w = torch.zeros(n, dtype=torch.float64)
    for _ in range(50):  # Newton's method
        wrong = torch.sigmoid(-(z @ w))
        g = 2e-3 * w - z.T @ wrong / samples
        curvature = (z.T * (wrong * (1 - wrong))) @ z / samples + 2e-3 * torch.eye(n, dtype=torch.float64)
        w = w - torch.linalg.solve(curvature, g)
    return Problem("logistic regression", loss, torch.zeros(n, dtype=torch.float64), float(loss(w)))


def problems() -> list[Problem]:
    def at(*start: float) -> Tensor:
        return torch.tensor(start, dtype=torch.float64)

    return [
        Problem("Rosenbrock", rosenbrock, at(-1.2, 1)),
        Problem("Beale", beale, at(1, 1)),
        Problem("Powell singular", powell_singular, at(3, -1, 0, 1)),
        Problem("Wood", wood, at(-3, -1, -3, -1)),
        quadratic(),
        logistic_regression(),
        Problem("extended Rosenbrock, 100", rosenbrock, at(-1.2, 1).repeat(50)),
    ]


class OutOfBudget(Exception):
    """So many evaluations were not enough."""


class Outcome(NamedTuple):
    """How a minimization went: evaluations of loss and gradient until solved (inf: never) and in all, the last gap."""

    solved: float
    calls: int
    gap: float


class Scaled:
    """s f(x / c) in a dtype: counts evaluations up to a budget, and knows when the loss is near the least."""

    def __init__(
        self,
        problem: Problem,
        s: float = 1.0,
        c: float = 1.0,
        dtype: torch.dtype = torch.float64,
        budget: int = 2000,
    ) -> None:
        self.problem, self.s, self.c, self.dtype, self.budget = problem, s, c, dtype, budget
        self.start = (problem.start * c).to(dtype)
        first = float(problem.loss(problem.start))
        # Of all that there is to gain; float32 has 7 digits of the loss.
        self.near = (1e-10 if dtype == torch.float64 else 1e-6) * (first - problem.least)
        self.calls, self.solved, self.last = 0, math.inf, self.start

    def gap(self, x: Tensor) -> float:
        return float(self.problem.loss(x.detach().double() / self.c)) - self.problem.least

    def loss(self, x: Tensor) -> Tensor:
        if self.calls == self.budget:
            raise OutOfBudget
        self.calls += 1
        self.last = x.detach().clone()
        loss = self.problem.loss(x / self.c)
        if math.isinf(self.solved):
            gap = float(loss.detach()) - self.problem.least if self.dtype == torch.float64 else self.gap(x)
            if gap <= self.near:
                self.solved = self.calls
        return self.s * loss

    def outcome(self, x: Tensor) -> Outcome:
        return Outcome(self.solved, self.calls, self.gap(x))

    def by_ours(self, cls: type = NonlinearCG, **options: object) -> Outcome:
        """One step, which ends by its tolerances or with the budget."""
        p = Parameter(self.start.clone())
        optimizer = cls([p], **{"max_iter": self.budget, "max_eval": self.budget, **options})

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(p)
            loss.backward()
            return loss

        with suppress(OutOfBudget):  # the last line search may take a few more
            optimizer.step(closure)
            self.last = p.detach()
        return self.outcome(self.last)

    def by_scipy(self, method: str, **options: object) -> Outcome:
        limits = {"maxiter": self.budget} | ({"maxfun": self.budget + 1} if method == "L-BFGS-B" else {})

        def value_and_gradient(x: numpy.ndarray) -> tuple[float, numpy.ndarray]:
            p = torch.tensor(x, dtype=self.dtype, requires_grad=True)
            loss = self.loss(p)
            loss.backward()
            return loss.item(), p.grad.double().numpy()

        with suppress(OutOfBudget), numpy.errstate(all="ignore"):
            found = scipy.optimize.minimize(
                value_and_gradient,
                self.start.double().numpy(),
                jac=True,
                method=method,
                options={**limits, **options},
            )
            self.last = torch.from_numpy(found.x)
        return self.outcome(self.last)

    def largest_gradient(self) -> float:
        """At the start: what tolerances are relative to."""
        p = self.start.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.s * self.problem.loss(p / self.c), p)
        return float(g.abs().max())
