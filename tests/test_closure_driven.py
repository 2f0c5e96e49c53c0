"""LBFGS is torch's LBFGS, evaluation for evaluation; both optimizers go up where they maximize."""

import copy
import inspect
import math

import pytest
import torch
from closures import BETAS, BOTH, EXACT, SEARCHES, closure_of, evaluations_until_solved, pair, quadratic, rosenbrock
from conftest import TORCH
from torch.nn import Parameter

import triton_optim as to

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
