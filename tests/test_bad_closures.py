"""What LBFGS and NonlinearCG refuse, and what a closure that fails leaves as it was."""

import math

import pytest
import torch
from closures import BOTH, closure_of, pair, rosenbrock
from torch.nn import Parameter
from two_tensor import TwoTensor, parameter, value_of

import triton_optim as to


@BOTH
def test_constructor_errors_are_torchs(cls) -> None:
    p, q = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"doesn't support per-parameter options \(parameter groups\)"):
        cls([{"params": [p]}, {"params": [q]}])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        cls([p], lr=-1)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        cls([p], lr=torch.ones(2))
    with pytest.raises(ValueError, match="parameter groups"):
        cls([p]).add_param_group({"params": [q]})


def test_only_strong_wolfe_is_supported() -> None:
    p, optimizer, closure = pair(line_search_fn="armijo")[1]
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        optimizer.step(closure)
    assert torch.equal(p, torch.full_like(p, 0.5))


@BOTH
def test_a_step_needs_a_closure(cls) -> None:
    with pytest.raises(TypeError, match="step needs a closure"):
        cls([Parameter(torch.ones(1))]).step()


@BOTH
@pytest.mark.parametrize("value", [None, torch.ones(2), "loss", torch.tensor(1j)], ids=["None", "vector", "str", "1j"])
@pytest.mark.parametrize("good_calls", [0, 3])
def test_a_closure_must_return_the_loss(cls, value, good_calls) -> None:
    p = Parameter(torch.tensor([-1.2, 1.0]))
    optimizer = cls([p])
    closure = closure_of(optimizer, rosenbrock, [p])
    if cls is to.LBFGS:
        optimizer.param_groups[0]["line_search_fn"] = "strong_wolfe"
    evaluated_at = []

    def bad():
        evaluated_at.append(p.detach().clone())
        return closure() if closure.calls < good_calls else value

    with pytest.raises(RuntimeError, match="closure must return the loss"):
        optimizer.step(bad)
    # A line search in progress goes back to its start, which is one of the points that were good.
    assert any(torch.equal(p, at) for at in evaluated_at[: max(good_calls, 1)])
    loss = rosenbrock(p.detach())
    optimizer.step(closure)
    assert rosenbrock(p.detach()) < loss


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_first_loss_that_is_not_finite_changes_nothing(cls, bad) -> None:
    p = Parameter(torch.ones(3))
    optimizer = cls([p])
    loss = optimizer.step(closure_of(optimizer, lambda p: p.sum() * bad, [p]))
    assert not loss.isfinite()
    assert torch.equal(p, torch.ones(3))


@BOTH
def test_a_search_backs_off_from_nan(cls) -> None:
    """Log is NaN left of 0, and the first step is a million times too long."""
    options = {"line_search_fn": "strong_wolfe"} if cls is to.LBFGS else {}
    p = Parameter(torch.tensor([3.0, 0.5], dtype=torch.float64))
    optimizer = cls([p], lr=1e6, max_iter=100, **options)
    if cls is to.LBFGS:
        optimizer.param_groups[0]["lr"] = 1e6

    def loss_of(p):
        return (p - p.log()).sum()

    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss_of, [p]))
    torch.testing.assert_close(p.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)


@BOTH
def test_a_search_with_nothing_finite_raises_and_goes_back(cls) -> None:
    options = {"line_search_fn": "strong_wolfe"} if cls is to.LBFGS else {}
    start = torch.tensor([1.0, 2.0])
    p = Parameter(start.clone())
    optimizer = cls([p], tolerance_change=1e-5, **options)

    def loss_of(p):
        return p.square().sum() * (1.0 if torch.equal(p, start) else math.nan)

    with pytest.raises(RuntimeError, match=r"NaN or Inf at all .* what is minimized is 5 at the start; .*closure"):
        optimizer.step(closure_of(optimizer, loss_of, [p]))
    assert torch.equal(p, start)
    optimizer.step(closure_of(optimizer, lambda p: (p - 1).square().sum(), [p]))
    torch.testing.assert_close(p.detach(), torch.ones(2))


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("good_calls", [0, 2])
def test_a_gradient_that_is_not_finite_is_no_step(cls, bad, good_calls) -> None:
    """The loss is finite: at the start nothing changes, later the search steps back."""
    options = {"line_search_fn": "strong_wolfe"} if cls is to.LBFGS else {}
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    p = Parameter(start.clone())
    optimizer = cls([p], **options)
    closure = closure_of(optimizer, rosenbrock, [p])

    def sometimes_bad():
        loss = closure()
        if good_calls < closure.calls <= good_calls + 2 or not good_calls:
            p.grad[0] = bad
        return loss

    optimizer.step(sometimes_bad)
    assert p.isfinite().all()
    if good_calls:
        assert rosenbrock(p.detach()) < rosenbrock(start)
    else:
        assert torch.equal(p, start)
        assert closure.calls == 1


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_search_that_finds_nothing_finite_ends(cls, dtype) -> None:
    """After 20 trials, the shortest 1e-20 of the first; with parameters of 0 no interval is too narrow before."""
    options = {"line_search_fn": "strong_wolfe", "tolerance_change": 0.0} if cls is to.LBFGS else {}
    p = Parameter(torch.zeros(2, dtype=dtype))
    optimizer = cls([p], max_iter=1000, **options)
    values = iter([1.0])
    closure = closure_of(optimizer, lambda p: (p + 1).sum() * 0 + p.sum() + next(values, math.nan), [p])
    with pytest.raises(RuntimeError, match=r"NaN or Inf at all .* steps tried"):
        optimizer.step(closure)
    assert torch.equal(p, torch.zeros_like(p))
    assert closure.calls <= 21


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_loss_without_a_lower_bound_falls_to_the_end_of_the_dtype(cls, dtype) -> None:
    """Then the error says so; parameters and loss stay finite throughout."""
    options = {"line_search_fn": "strong_wolfe"} if cls is to.LBFGS else {}
    p = Parameter(torch.zeros(2, dtype=dtype))
    optimizer = cls([p], **options)
    closure = closure_of(optimizer, lambda p: -p.sum(), [p])
    raised = False
    for _ in range(12):
        try:
            optimizer.step(closure)
        except RuntimeError as error:
            assert "a loss that falls without bound" in str(error)  # noqa: PT017
            raised = True
        assert p.isfinite().all()
        assert torch.isfinite(-p.detach().sum())
    # torch's LBFGS, and so ours, extends a search to 1e25 and stops there; float16 parameters stay at the end of their
    # dtype, where shorter steps are rounded away.
    assert raised == (cls is to.NonlinearCG and dtype != torch.float16)
    assert p.min() > 1e4


@BOTH
def test_where_the_gradient_is_zero_nothing_moves(cls) -> None:
    """A minimum, a maximum, a saddle, a plateau."""
    for loss_of, start in (
        (lambda p: p.square().sum(), 0.0),
        (lambda p: -p.square().sum(), 0.0),
        (lambda p: p[0] ** 2 - p[1] ** 2, 0.0),
        (lambda p: p.relu().sum(), -1.0),
        (lambda p: 0 * p.sum() + 3, 5.0),
    ):
        p = Parameter(torch.full((2,), start))
        optimizer = cls([p])
        for _ in range(2):
            closure = closure_of(optimizer, loss_of, [p])
            optimizer.step(closure)
            assert closure.calls == 1
        assert torch.equal(p, torch.full((2,), start))


def test_flat_regions_are_left() -> None:
    """Gradients of 1e-10 and 1e-7; the absolute tolerances of LBFGS take these for minima."""
    for loss_of, start, minimum in (
        (lambda p: -(-((p - 3) ** 2)).exp().sum(), 8.0, 3.0),
        (lambda p: (p.tanh() ** 2).sum(), 9.0, 0.0),
    ):
        p = Parameter(torch.tensor([start], dtype=torch.float64))
        optimizer = to.NonlinearCG([p], max_iter=50)
        optimizer.step(closure_of(optimizer, loss_of, [p]))
        assert p.item() == pytest.approx(minimum, abs=1e-5)


def test_a_gradient_that_is_wrong_moves_by_no_more_than_rounding() -> None:
    """The loss rises where its gradient says that it falls."""
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        p = Parameter(torch.ones(1, dtype=dtype))
        optimizer = to.NonlinearCG([p])
        closure = closure_of(optimizer, lambda p: (2 * p.detach() - p).sum() + 1, [p])
        optimizer.step(closure)
        assert abs(p.item() - 1) < most
        assert closure.calls <= 51


def test_a_parameter_of_infinity_that_has_no_gradient_stays() -> None:
    """A mask at -inf; the units of the others are theirs alone."""
    mask = torch.tensor([0.0, -math.inf, 0.0])
    p = Parameter(torch.tensor([2.0, -math.inf, -2.0], dtype=torch.float64))
    optimizer = to.NonlinearCG([p])
    optimizer.step(closure_of(optimizer, lambda p: ((p[mask == 0] - 1) ** 2).sum(), [p]))
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, -math.inf, 1.0], dtype=torch.float64))


def test_steps_at_the_minimum_take_few_evaluations() -> None:
    p = Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = to.NonlinearCG([p], max_iter=200)
    closure = closure_of(optimizer, rosenbrock, [p])
    optimizer.step(closure)
    losses = [rosenbrock(p.detach()).item()]
    for _ in range(5):
        closure.calls = 0
        optimizer.step(closure)
        assert closure.calls <= 10
        losses.append(rosenbrock(p.detach()).item())
    assert losses == sorted(losses, reverse=True)


def test_without_a_search_a_step_ends_where_the_loss_is_not_finite() -> None:
    p = Parameter(torch.tensor([1.0]))
    optimizer = to.LBFGS([p], lr=10)
    closure = closure_of(optimizer, lambda p: (p.log() + p).sum(), [p])
    optimizer.step(closure)
    assert closure.calls == 2
    assert p.isfinite()


@BOTH
def test_the_first_loss_is_returned_and_gradients_are_enabled(cls) -> None:
    p = Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = cls([p])
    expected = rosenbrock(p.detach())
    with torch.no_grad():
        assert optimizer.step(closure_of(optimizer, rosenbrock, [p])) == expected
    assert optimizer.step(lambda: 0.25) == 0.25


@BOTH
def test_nothing_to_do(cls) -> None:
    for p in (Parameter(torch.empty(0)), Parameter(torch.zeros(2))):
        optimizer = cls([p])
        assert optimizer.step(closure_of(optimizer, lambda p: p.square().sum(), [p])) == 0
    p = Parameter(torch.ones(2))
    optimizer = cls([p], lr=0.0)
    optimizer.step(closure_of(optimizer, lambda p: p.square().sum(), [p]))
    assert torch.equal(p, torch.ones(2))


@BOTH
def test_gradient_of_zero_that_is_not_small_enough(cls):
    p = Parameter(torch.ones(2))
    optimizer = cls([p], tolerance_grad=-math.inf)
    assert optimizer.step(lambda: torch.tensor(10.0)) == 10
    assert torch.equal(p, torch.ones(2))


def test_state_dict_hook_may_add_what_is_no_state():
    optimizer = to.LBFGS([Parameter(torch.ones(2))])
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.update(note=1))
    assert optimizer.state_dict()["state"] == {"note": 1}


def test_group_with_a_parameter_of_another_group_is_refused_as_such():
    p = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        to.LBFGS([{"params": [p]}, {"params": [p]}])


@BOTH
@pytest.mark.parametrize("among_others", [False, True])
def test_parameters_without_memory_of_their_own(cls, among_others):
    """A flat vector of wrapper subclasses would be one itself."""
    ends = []
    for wraps in (False, True):
        values = [torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 3)]
        params = [parameter(v) if wraps and not (among_others and i) else Parameter(v) for i, v in enumerate(values)]
        optimizer = cls(params)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, lambda p, q: (p**4).sum() + ((q - 1) ** 2).sum(), params))
        ends.append([value_of(p) if type(p) is TwoTensor else p.detach() for p in params])
    torch.testing.assert_close(*ends)
