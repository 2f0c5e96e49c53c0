"""LBFGS is torch's LBFGS, evaluation for evaluation; NonlinearCG minimises; both survive bad closures."""

import copy
import inspect
import math

import pytest
import torch
from conftest import TORCH
from torch.nn import Parameter
from two_tensor import TwoTensor, parameter, value_of

import triton_optim as to
from triton_optim.optimizers.closure.line_search import Trial, strong_wolfe

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


# LBFGS against torch's


def test_arguments_are_those_of_torch() -> None:
    ours, theirs = (list(inspect.signature(cls).parameters.values()) for cls in (to.LBFGS, torch.optim.LBFGS))
    newer = ["maximize"] if TORCH < (2, 14) else []
    assert [(a.name, a.default, a.kind) for a in ours if a.name not in newer] == [
        (a.name, a.default, a.kind) for a in theirs
    ]
    (_, theirs, _), (_, ours, _) = pair()
    assert ours.defaults == theirs.defaults | dict.fromkeys(newer, False)


@SEARCHES
@pytest.mark.parametrize("history_size", [1, 3, 7, 100])
def test_lbfgs_takes_torchs_path(line_search_fn, history_size) -> None:
    lr = 1 if line_search_fn else 1e-1
    (p, theirs, their_closure), (q, ours, our_closure) = pair(
        line_search_fn=line_search_fn, history_size=history_size, lr=lr, max_iter=7
    )
    for _ in range(6):
        expected, loss = theirs.step(their_closure), ours.step(our_closure)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-9)
        assert our_closure.calls == their_closure.calls
    a, b = ours.state[q], theirs.state[p]
    assert set(b) - set(a) == {"al"}
    assert (a["func_evals"], a["n_iter"], len(a["ro"])) == (b["func_evals"], b["n_iter"], len(b["ro"]))
    assert len(a["old_dirs"]) == len(a["old_stps"]) <= history_size


def test_a_long_history_takes_torchs_path() -> None:
    """1000 parameters and 60 pairs on an ill-conditioned quadratic, where each pair counts."""
    scales = torch.logspace(0, 3, 1000, dtype=torch.float64)
    finals = []
    for cls in (torch.optim.LBFGS, to.LBFGS):
        p = Parameter(torch.zeros(1000, dtype=torch.float64))
        optimizer = cls([p], max_iter=60, line_search_fn="strong_wolfe", history_size=50)
        optimizer.step(closure_of(optimizer, lambda p: (0.5 * scales * (p - 1) ** 2).sum(), [p]))
        finals.append(p.detach())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-6, atol=1e-9)


def test_float32_gets_as_far_as_torch() -> None:
    """The products of the pairs are rounded to float32; directions must stay as good as the recursion's."""
    for loss_of, n in ((rosenbrock, 30), (quadratic(1e4, 40, torch.float32), 40)):
        losses = []
        for cls in (torch.optim.LBFGS, to.LBFGS):
            p = Parameter(torch.zeros(n))
            optimizer = cls([p], max_iter=300, tolerance_change=0, line_search_fn="strong_wolfe")
            optimizer.step(closure_of(optimizer, loss_of, [p]))
            losses.append(loss_of(p.detach()).item())
        assert losses[1] <= 2 * losses[0] + 1e-8


@SEARCHES
@pytest.mark.parametrize("to_ours", [True, False])
def test_state_dicts_load_both_ways_in_mid_training(line_search_fn, to_ours) -> None:
    lr = 1 if line_search_fn else 1e-1
    classes = (torch.optim.LBFGS, to.LBFGS) if to_ours else (to.LBFGS, torch.optim.LBFGS)
    options = {"line_search_fn": line_search_fn, "lr": lr, "max_iter": 4, "history_size": 5}
    (p, source, source_closure), (q, target, target_closure) = pair(*classes, **options)
    for _ in range(3):
        source.step(source_closure)
    with torch.no_grad():
        q.copy_(p)
    # A copy: torch's state dict holds the tensors that its next step overwrites.
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for _ in range(4):
        source.step(source_closure)
        target.step(target_closure)
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-9)


@SEARCHES
def test_memory_that_was_never_written_is_never_read(line_search_fn) -> None:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        test_lbfgs_takes_torchs_path(line_search_fn, 7)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_with_gaps_are_taken() -> None:
    """torch.optim.LBFGS raises RuntimeError for them."""
    p = Parameter(torch.randn(4, 3).T)
    optimizer = to.LBFGS([p])
    optimizer.step(closure_of(optimizer, lambda p: (p - 1).square().sum(), [p]))
    torch.testing.assert_close(p.detach(), torch.ones(3, 4))


def test_a_state_dict_is_a_copy_of_the_history() -> None:
    p, optimizer, closure = pair(history_size=2)[1]
    optimizer.step(closure)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"][0])
    optimizer.step(closure)
    for a, b in zip(before["old_dirs"], saved["state"][0]["old_dirs"], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(before["prev_flat_grad"], saved["state"][0]["prev_flat_grad"])
    assert len(optimizer.state[p]["old_dirs"]) == 2


def test_a_copied_optimizer_continues_alike() -> None:
    p, optimizer, closure = pair(line_search_fn="strong_wolfe", max_iter=4)[1]
    optimizer.step(closure)
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    twin_closure = closure_of(twin, rosenbrock, [q])
    for _ in range(3):
        optimizer.step(closure)
        twin.step(twin_closure)
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)


@SEARCHES
def test_complex_sparse_missing_and_strided_gradients(line_search_fn) -> None:
    finals = []
    for cls in (torch.optim.LBFGS, to.LBFGS):
        torch.manual_seed(1)
        z = Parameter(torch.randn(3, dtype=torch.complex128))
        table = torch.nn.Embedding(5, 2, sparse=True, dtype=torch.float64)
        unused = Parameter(torch.ones(2, 2, dtype=torch.float64))
        strided = Parameter(torch.randn(3, 4, dtype=torch.float64)[:, ::2])
        scalar = Parameter(torch.tensor(2.0, dtype=torch.float64))
        params = [z, table.weight, unused, strided, scalar]
        optimizer = cls(params, lr=0.1, max_iter=5, line_search_fn=line_search_fn)
        index = torch.tensor([0, 3, 3])

        def loss_of(z, table_weight, unused, strided, scalar, table=table, index=index):
            dense = (z - (1 + 2j)).abs().square().sum() + (strided.reshape(-1) - 1).square().sum() + scalar**4
            return dense + (table(index) - 3).square().sum()

        for _ in range(3):
            optimizer.step(closure_of(optimizer, loss_of, params))
        assert torch.equal(unused, torch.ones_like(unused))
        finals.append([p.detach() for p in params])
    for theirs, ours in zip(*finals, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


# Ascent


def ascending(cls, loss_of, start, steps=3, **options):
    """The parameter after some steps that maximize `loss_of`, what they returned, and the evaluations."""
    p = Parameter(start.clone())
    optimizer = cls([p], **options)
    closure = closure_of(optimizer, loss_of, [p])
    losses = [float(optimizer.step(closure).detach()) for _ in range(steps)]
    return p.detach(), losses, closure.calls, optimizer


@BOTH
@pytest.mark.parametrize("search", [{}, {"line_search_fn": "strong_wolfe"}], ids=["plain", "search"])
def test_to_maximize_is_to_minimize_the_negative(cls, search) -> None:
    options = {"lr": 1e-2, "max_iter": 6} | (search if cls is to.LBFGS else {})
    start = torch.full((6,), 0.5, dtype=torch.float64)
    p, losses, calls, _ = ascending(cls, lambda p: -rosenbrock(p), start, maximize=True, **options)
    q, negated, their_calls, _ = ascending(cls, rosenbrock, start, **options)
    assert torch.equal(p, q)
    assert losses == [-loss for loss in negated]  # a step returns the loss, not what is minimized
    assert calls == their_calls
    assert losses[-1] > losses[0]


@pytest.mark.skipif(TORCH < (2, 14), reason="torch's LBFGS can't maximize before 2.14")
@SEARCHES
def test_maximizing_takes_torchs_path(line_search_fn) -> None:
    options = {"line_search_fn": line_search_fn, "lr": 1 if line_search_fn else 1e-2, "max_iter": 6, "maximize": True}
    start = torch.full((6,), 0.5, dtype=torch.float64)
    ours, theirs = (
        ascending(cls, lambda p: -rosenbrock(p), start, steps=5, **options) for cls in (to.LBFGS, torch.optim.LBFGS)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-9)
    assert (ours[1], ours[2]) == (pytest.approx(theirs[1]), theirs[2])
    (a, b) = (optimizer.state_dict()["state"][0] for *_, optimizer in (ours, theirs))
    for name in ("prev_loss", "d", "prev_flat_grad"):  # negated in both
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-8)


@BOTH
def test_a_loaded_group_says_whether_to_maximize(cls) -> None:
    """And one that was saved before it could say so minimizes."""
    p = Parameter(torch.zeros(1))
    optimizer = cls([p])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["maximize"] = True
    optimizer.load_state_dict(saved)
    optimizer.step(closure_of(optimizer, lambda p: -((p - 3) ** 2).sum(), [p]))
    assert p.item() == pytest.approx(3)
    optimizer = cls([p], maximize=True)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["maximize"]
    optimizer.load_state_dict(saved)
    optimizer.step(closure_of(optimizer, lambda p: ((p - 1) ** 2).sum(), [p]))
    assert p.item() == pytest.approx(1)


# 16 bits, no parameters, another default device


@BOTH
@pytest.mark.parametrize("search", [{}, {"line_search_fn": "strong_wolfe"}], ids=["plain", "search"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_16_bit_vectors_do_not_overflow(cls, search, dtype) -> None:
    """The gradient's square is 2e5, of which float16 has no number."""
    options = search if cls is to.LBFGS else {}
    scales = torch.linspace(20, 40, 200, dtype=dtype)
    p = Parameter(torch.ones(200, dtype=dtype))
    optimizer = cls([p], max_iter=40, **options)
    optimizer.step(closure_of(optimizer, lambda p: (scales * (p - 0.5) ** 2).float().sum(), [p]))
    torch.testing.assert_close(p.detach().float(), torch.full((200,), 0.5), rtol=0, atol=0.01)


@BOTH
@pytest.mark.parametrize("dtypes", [(torch.float16,), (torch.bfloat16,), (torch.float32, torch.float64)])
def test_state_of_other_dtypes_than_the_first_parameters_resumes(cls, dtypes) -> None:
    ends = []
    for resumed in (False, True):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(5).to(dtype)) for dtype in dtypes]
        optimizer = cls(params, max_iter=3, lr=0.1)

        def loss_of(*params):
            return sum(((p.double() - 1) ** 2).sum() + (p.double() ** 4).sum() for p in params)

        for i in range(4):
            if resumed and i == 2:
                saved = optimizer.state_dict()
                optimizer = cls(params, max_iter=3, lr=0.1)
                optimizer.load_state_dict(saved)
            optimizer.step(closure_of(optimizer, loss_of, params))
        ends.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *ends))


def test_torchs_state_of_16_bit_parameters_loads() -> None:
    p, source, closure = pair(torch.optim.LBFGS, dtype=torch.bfloat16, lr=0.01, max_iter=3)[0]
    for _ in range(2):
        source.step(closure)
    target = to.LBFGS([p], lr=0.01, max_iter=3)
    target.load_state_dict(source.state_dict())
    before = rosenbrock(p.detach())
    target.step(closure_of(target, rosenbrock, [p]))
    assert rosenbrock(p.detach()) < before
    assert target.state[p]["d"].dtype == torch.float32


@BOTH
def test_groups_without_parameters(cls) -> None:
    """A step is an evaluation: torch's LBFGS from 2.14 on, and every other optimizer."""
    optimizer = cls([{"params": []}])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    assert not optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(TypeError, match="step needs a closure"):
        optimizer.step()


@BOTH
@pytest.mark.parametrize("search", [{}, {"line_search_fn": "strong_wolfe"}], ids=["plain", "search"])
def test_another_default_device(cls, search) -> None:
    options = {"lr": 0.1, "max_iter": 5} | (search if cls is to.LBFGS else {})
    start = torch.full((4,), 0.5, dtype=torch.float64)
    ends = []
    for default in (None, "meta"):
        torch.set_default_device(default)
        try:
            p = Parameter(start.clone())
            optimizer = cls([p], **options)
            for _ in range(3):
                optimizer.step(closure_of(optimizer, rosenbrock, [p]))
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        finally:
            torch.set_default_device(None)
        ends.append(p.detach())
    assert torch.equal(*ends)


# Evaluations


def test_lbfgs_needs_no_more_evaluations_than_torch() -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    cases = [(rosenbrock, start), (rosenbrock, start.repeat(10))]
    cases += [(quadratic(k), torch.zeros(20, dtype=torch.float64)) for k in (1e2, 1e4)]
    for loss_of, at in cases:
        theirs, ours = (
            evaluations_until_solved(lambda p, c=cls: c(p, line_search_fn="strong_wolfe", **EXACT), loss_of, at)
            for cls in (torch.optim.LBFGS, to.LBFGS)
        )
        assert ours <= theirs < math.inf


@BETAS
def test_conjugate_gradients_need_at_most_twice_torchs_lbfgs(beta) -> None:
    """The default does; the other two need up to three times as many on some quadratics."""
    zeros = torch.zeros(20, dtype=torch.float64)
    cases = [(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64), 2)]
    cases += [(quadratic(k), zeros, 2 if beta == "polak-ribiere+" else 3) for k in (1e2, 1e3, 1e4)]
    for loss_of, at, times in cases:
        theirs = evaluations_until_solved(
            lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe", **EXACT), loss_of, at
        )
        ours = evaluations_until_solved(lambda p: to.NonlinearCG(p, beta=beta, **EXACT), loss_of, at)
        assert ours <= times * theirs < math.inf


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


# What both reject, and what they leave alone


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
