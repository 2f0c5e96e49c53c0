"""Functions to minimise, closures that count, and what is measured with them."""

import math

import pytest
import torch
from torch.nn import Parameter

import triton_optim as to

BOTH = pytest.mark.parametrize("cls", [to.LBFGS, to.NonlinearCG])
SEARCHES = pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
BETAS = pytest.mark.parametrize("beta", to.NonlinearCG.betas)
# The limits that are out of the way when a test counts evaluations to a given accuracy.
EXACT = {"max_iter": 400, "tolerance_grad": 1e-12, "tolerance_change": 1e-18}


def rosenbrock(p):
    return (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()


def quadratic(condition, n=20, dtype=torch.float64):
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    matrix = (basis * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ basis.T
    matrix = (0.5 * (matrix + matrix.T)).to(dtype)
    return lambda p: 0.5 * (p - 1) @ (matrix @ (p - 1))


def closure_of(optimizer, loss_of, params):
    def closure():
        closure.calls += 1
        optimizer.zero_grad()
        loss = loss_of(*params)
        loss.backward()
        return loss

    closure.calls = 0
    return closure


def evaluations_until_solved(make, loss_of, start, tolerance=1e-6):
    p = Parameter(start.clone())
    optimizer = make([p])
    solved = []

    def watched(p):
        if (p.detach() - 1).norm() < tolerance:
            solved.append(closure.calls)
        return loss_of(p)

    closure = closure_of(optimizer, watched, [p])
    optimizer.step(closure)
    return solved[0] if solved else math.inf


def pair(cls=torch.optim.LBFGS, other=to.LBFGS, start=(0.5,) * 6, dtype=torch.float64, **options):
    result = []
    for made in (cls, other):
        p = Parameter(torch.tensor(start, dtype=dtype))
        optimizer = made([p], **options)
        result.append((p, optimizer, closure_of(optimizer, rosenbrock, [p])))
    return result
