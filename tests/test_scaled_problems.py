"""NonlinearCG does the same in any units, and no worse than scipy's conjugate gradients in scipy's own."""

import math

import pytest
import torch
from scaled_problems import Problem, Scaled, problems
from torch import Tensor
from torch.nn import Parameter

from triton_optim import NonlinearCG

PROBLEMS = problems()
CORNERS = [(1e12, 1e-12), (1e-12, 1e12), (1e-12, 1e-12), (1e12, 1e12)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
BETAS = pytest.mark.parametrize("beta", NonlinearCG.betas)


def minimize(loss_of, start, **options) -> tuple[Parameter, int]:
    """One step from a start; the parameter and how many evaluations it took."""
    p = Parameter(start.clone())
    optimizer = NonlinearCG([p], **options)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(p)
        loss.backward()
        return loss

    optimizer.step(closure)
    return p, calls


def test_a_tiny_loss_is_minimized() -> None:
    p, calls = minimize(lambda p: (1e-5 * (p - 1) ** 2).sum(), torch.zeros(1))
    assert p.item() == pytest.approx(1, abs=1e-6)
    assert calls <= 10


@DTYPES
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_other_units_change_no_iteration(problem, dtype) -> None:
    """Powers of 2 round nothing: the iterates are the same to the last bit."""
    if problem.loss(problem.start) == 0:  # and p is 0: where there are no units, the first trial cannot be in them
        problem = problem._replace(start=problem.start + 0.1)
    seen = []
    for s, c in [(1.0, 1.0), *((2.0 ** round(math.log2(s)), 2.0 ** round(math.log2(c))) for s, c in CORNERS)]:
        p, calls = minimize(Scaled(problem, s, c, dtype).loss, (problem.start * c).to(dtype), max_iter=20)
        seen.append((calls, (p.detach() / c).tolist()))
    assert seen[0][0] > 20
    assert seen == [seen[0]] * 5


@BETAS
@DTYPES
@pytest.mark.parametrize(("s", "c"), CORNERS)
def test_products_of_gradients_neither_overflow_nor_vanish(s, c, dtype, beta) -> None:
    """Gradients of 1e24 and 1e-24: their squares are no numbers of float32."""
    rosenbrock, beale, *_ = PROBLEMS
    assert Scaled(rosenbrock, s, c, dtype, 100).by_ours(beta=beta).solved <= 90
    assert Scaled(beale, s, c, dtype, 100).by_ours(beta=beta).solved <= 45


@pytest.mark.parametrize("s", [1e-300, 1e-200, 1e200, 1e300])
def test_losses_near_the_ends_of_the_dtype(s) -> None:
    outcome = Scaled(PROBLEMS[0], s).by_ours()
    assert outcome.solved <= 90


@DTYPES
def test_a_start_without_units_is_left_in_some_evaluations(dtype) -> None:
    """Parameters and loss are 0: the first trial moves by lr, and the search goes on from there, ten times a trial."""
    for c in (1e-12, 1.0, 1e12):
        p, calls = minimize(
            lambda p, c=c: (0.5 * (p / c) ** 2 - p / c).sum(), torch.zeros(3, dtype=dtype), max_iter=100
        )
        torch.testing.assert_close(p.detach() / c, torch.ones(3, dtype=dtype), rtol=1e-5, atol=0)
        assert calls <= 40


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_where_losses_are_rounded_alike_slopes_decide(offset) -> None:
    """The losses say nothing of parameters nearer to the minimum than 0.01."""
    scales = torch.tensor([1.0, 3.0, 10.0])
    p, _ = minimize(lambda p: (0.5 * scales * (p - 1) ** 2).sum() + offset, torch.zeros(3), max_iter=100)
    torch.testing.assert_close(p.detach(), torch.ones(3), rtol=0, atol=1e-5)


def test_tolerances_are_relative() -> None:
    scales = torch.logspace(0, 3, 20, dtype=torch.float64)
    for s in (1e-9, 1.0, 1e9):
        calls = [
            minimize(
                lambda p, s=s: s * (0.5 * scales * (p - 1) ** 2).sum(),
                torch.zeros(20, dtype=torch.float64),
                max_iter=100,
                **tolerance,
            )[1]
            for tolerance in ({"tolerance_grad": 1e-2}, {"tolerance_change": 1e-2}, {"tolerance_grad": 1.0}, {})
        ]
        assert calls[2] == 1  # all of the gradient at the start is no more than itself
        assert 1 < calls[0] < calls[3]
        assert 1 < calls[1] < calls[3]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_beside_scipys_conjugate_gradients(problem: Problem) -> None:
    """Scipy's tolerance is of the copy's units too. benchmarks/closure_evaluations.py has a hundred copies."""
    ours, theirs = [], []
    for s, c in [(1.0, 1.0), (1e-12, 1e12), (1e12, 1e-12)]:
        mine, other = (Scaled(problem, s, c, budget=300) for _ in range(2))
        ours.append(mine.by_ours())
        theirs.append(other.by_scipy("CG", gtol=1e-8 * other.largest_gradient()))
    assert all(outcome.solved < math.inf for outcome in ours)
    # In units of 1, which scipy's first step and tolerances are made for; and in others, where luck with them is more.
    assert ours[0].solved <= 1.25 * theirs[0].solved
    assert ours[0].calls <= 1.25 * theirs[0].calls
    assert all(a.solved <= 1.5 * b.solved for a, b in zip(ours, theirs, strict=True))
