"""NonlinearCG minimises, and its line search holds to strong Wolfe conditions."""

import copy
import math

import pytest
import torch
from closures import BETAS, closure_of, pair, rosenbrock
from torch.nn import Parameter

import triton_optim as to
from triton_optim.optimizers.closure.line_search import Trial, strong_wolfe

# NonlinearCG


@BETAS
def test_on_a_quadratic_directions_are_conjugate_with_exact_searches(beta) -> None:
    """All three beta are then the same, and n iterations are enough."""
    p = Parameter(torch.zeros(4, dtype=torch.float64))
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    state = {"t": 1.0, "since_restart": 1}
    optimizer = to.NonlinearCG([p], beta=beta)
    g = -scales
    d, _ = optimizer._direction({}, g)
    for _ in range(4):
        t = -float(g @ d) / float(d @ (scales * d))
        before, g = g, g + t * scales * d
        state |= {"d": d, "prev_flat_grad": before}
        new, slope = optimizer._direction(state, g)
        if g.norm() > 1e-9:
            assert abs(float(new @ (scales * d))) < 1e-9
            assert slope == pytest.approx(float(new @ g))
        d = new
    assert g.norm() < 1e-9


@BETAS
@pytest.mark.parametrize("restart", [1, 3, None])
def test_restarts(beta, restart) -> None:
    start = torch.full((10,), -0.5, dtype=torch.float64)
    p = Parameter(start.clone())
    optimizer = to.NonlinearCG([p], beta=beta, restart=restart, max_iter=1, max_eval=20)
    closure = closure_of(optimizer, rosenbrock, [p])
    since = []
    for _ in range(12):
        optimizer.step(closure)
        state = optimizer.state[p]
        since.append(state["since_restart"])
        g = state["prev_flat_grad"]
        steepest = torch.equal(state["d"], -g / g.abs().max())
        assert steepest or since[-1] > 1
    assert max(since) <= (restart or 12)
    assert rosenbrock(p) < rosenbrock(start)


@BETAS
def test_conjugate_gradients_state_dict_round_trip(beta) -> None:
    (p, one, closure), (q, two, twin_closure) = pair(to.NonlinearCG, to.NonlinearCG, max_iter=3, beta=beta)
    for _ in range(2):
        one.step(closure)
    with torch.no_grad():
        q.copy_(p)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        assert torch.equal(one.step(closure), two.step(twin_closure))
        assert torch.equal(p, q)


def test_conjugate_gradients_reject_their_arguments() -> None:
    p = Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="Invalid beta: 'dai-yuan'"):
        to.NonlinearCG([p], beta="dai-yuan")
    with pytest.raises(ValueError, match="Invalid restart: 0"):
        to.NonlinearCG([p], restart=0)


# The line search


@pytest.mark.parametrize("c2", [0.1, 0.9])
@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("curve", ["more_thuente_1", "more_thuente_2", "barrier"])
def test_strong_wolfe_conditions_hold(curve, first, c2) -> None:
    """Moré & Thuente 1994, functions 1 and 2, https://doi.org/10.1145/192115.192132; and one that ends at 3."""
    curves = {
        "more_thuente_1": lambda t: -t / (t * t + 2),
        "more_thuente_2": lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4,
        "barrier": lambda t: (t - 4) ** 2 - (3 - t).log(),
    }

    def evaluate(t):
        x = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        loss = curves[curve](x)
        (g,) = torch.autograd.grad(loss, x)
        return float(loss.detach()), g.reshape(1), float(g)

    start = Trial(0.0, *evaluate(0.0))
    found, evaluations = strong_wolfe(evaluate, start, first, c2=c2)
    assert found.loss <= start.loss + 1e-4 * found.t * start.slope
    assert abs(found.slope) <= -c2 * start.slope
    assert evaluations <= 20
    assert (found.loss, found.slope) == (evaluate(found.t)[0], evaluate(found.t)[2])


def test_a_search_out_of_trials_gives_the_lowest() -> None:
    def evaluate(t):
        return -t, torch.tensor([-1.0]), -1.0

    found, evaluations = strong_wolfe(evaluate, Trial(0.0, *evaluate(0.0)), 1.0, max_trials=3)
    assert evaluations == 4
    assert found.t == -found.loss > 100


def test_trials_that_are_not_finite_use_up_no_budget() -> None:
    def evaluate(t):
        return ((t - 1e-9) ** 2 if t < 1e-8 else math.nan), torch.zeros(1), 2 * (t - 1e-9)

    found, evaluations = strong_wolfe(evaluate, Trial(0.0, *evaluate(0.0)), 1.0, max_trials=2)
    assert 0 < found.t < 1e-8
    assert evaluations <= 11
