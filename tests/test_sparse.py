"""Sparse gradients: only what they hold is touched, and that as torch does."""

import copy
import warnings
from typing import Any

import pytest
import torch
from one_step import step_with
from torch import Tensor
from torch.nn import Parameter

import triton_optim

ROWS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ("SparseAdam", {"lr": 0.1}),
    ("SparseAdam", {"lr": torch.tensor(0.1), "betas": (0.8, 0.95), "maximize": True}),
]

each_row = pytest.mark.parametrize(("name", "options"), ROWS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ROWS)])


def gradient(shape: tuple[int, ...], rows: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries for these rows, in their order, some of them more than once."""
    values = torch.randn(len(rows), *shape[1:], dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


def side_by_side(name: str, options: dict[str, Any], start: list[Tensor], gradients: list[list[Tensor]]) -> list:
    """The parameters after these steps, ours and torch's, and the optimizers."""
    sides = []
    for cls in (getattr(triton_optim, name), getattr(torch.optim, name)):
        params = [Parameter(x.clone()) for x in start]
        optimizer = cls(params, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse invariant checks")  # torch's own constructions
            for own in gradients:
                step_with(optimizer, params, [g.clone() for g in own])
        sides.append((params, optimizer))
    return sides


@each_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_updates(name: str, options: dict, dtype: torch.dtype) -> None:
    start = [torch.randn(7, 3, dtype=dtype), torch.randn(5, dtype=dtype), torch.randn(4, 2, 3, dtype=dtype)]
    steps = [
        [gradient((7, 3), rows, dtype), gradient((5,), rows[:3], dtype), gradient((4, 2, 3), [3, 3], dtype)]
        for rows in ([1, 4, 1], [0, 2, 3, 3], [4], [1, 4, 2])
    ]
    (ours, mine), (theirs, torchs) = side_by_side(name, options, start, steps)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        for key, value in torchs.state[b].items():
            if value is not None:
                torch.testing.assert_close(mine.state[a][key], value, rtol=1e-6, atol=1e-7)


@each_row
def test_other_rows_are_not_touched(name: str, options: dict) -> None:
    p = Parameter(torch.full((6, 2), torch.nan))
    with torch.no_grad():
        p[[1, 3]] = 1.0
    optimizer = getattr(triton_optim, name)([p], **options)
    p.grad = gradient((6, 2), [3, 1, 3])
    optimizer.step()
    assert p[[1, 3]].isfinite().all()
    assert p[[0, 2, 4, 5]].isnan().all()
    for value in optimizer.state[p].values():
        if isinstance(value, Tensor) and value.shape == p.shape:
            assert torch.equal(value[0], value[2])
            assert not torch.equal(value[0], value[1])


@each_row
def test_a_gradient_that_holds_nothing_is_a_step(name: str, options: dict) -> None:
    p = Parameter(torch.ones(4, 2))
    optimizer = getattr(triton_optim, name)([p], **options)
    for _ in range(2):
        p.grad = gradient((4, 2), [])
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 2))
    assert optimizer.state[p].get("step", 2) == 2


def test_more_sparse_dimensions_than_one() -> None:
    places = torch.tensor([[0, 2, 2], [1, 0, 0]])
    g = torch.sparse_coo_tensor(places, torch.randn(3), (3, 2), check_invariants=True)
    (ours, _), (theirs, _) = side_by_side("SparseAdam", {}, [torch.randn(3, 2)], [[g], [g]])
    torch.testing.assert_close(ours[0], theirs[0])


def test_a_step_is_an_int() -> None:
    p = Parameter(torch.ones(4, 2))
    optimizer = triton_optim.SparseAdam([p])
    for _ in range(3):
        p.grad = gradient((4, 2), [1])
        optimizer.step()
    assert type(optimizer.state[p]["step"]) is int
    resumed = triton_optim.SparseAdam([p])
    resumed.load_state_dict(optimizer.state_dict())
    p.grad = gradient((4, 2), [1])
    resumed.step()
    assert resumed.state[p]["step"] == 4
    assert type(resumed.state[p]["step"]) is int


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_beside_dense_gradients(name: str) -> None:
    """An embedding among other parameters; the plan is kept from step to step."""
    runs = []
    for cls in (getattr(triton_optim, name), getattr(torch.optim, name)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 3))
        optimizer = cls(model.parameters(), lr=0.1)
        plans = set()
        for _ in range(4):
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse invariant checks")
                model(torch.randint(0, 10, (5,))).square().sum().backward()
                optimizer.step()
            plans.add(id(optimizer.engine.plan) if isinstance(optimizer, triton_optim.RuleOptimizer) else 0)
        assert len(plans) == 1
        runs.append(list(model.parameters()))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_and_dense_by_turns() -> None:
    gradients = [gradient((6, 2), [1, 2]), torch.randn(6, 2), gradient((6, 2), [0]), torch.randn(6, 2)]
    runs = []
    for sparse in (True, False):
        p = Parameter(torch.ones(6, 2))
        optimizer = triton_optim.Adagrad([p], lr=0.1)
        for g in gradients:
            p.grad = g.clone() if sparse else g.to_dense()
            optimizer.step()
        assert optimizer.state[p]["step"] == 4
        runs.append(p)
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_complex_parameters(name: str) -> None:
    """As with dense gradients; torch's Adagrad squares the complex numbers themselves here, and only here."""
    start = torch.randn(5, 2, dtype=torch.complex64)
    steps = [gradient((5, 2), [1, 4, 1], torch.complex64) for _ in range(3)]
    runs = []
    for sparse in (True, False):
        p = Parameter(start.clone())
        optimizer = getattr(triton_optim, name)([p], lr=0.1)
        for g in steps:
            p.grad = g.clone() if sparse else g.to_dense()
            optimizer.step()
        runs.append(p)
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("AdamW", {}, "moves elements whose gradient is 0"),
        ("Adagrad", {"weight_decay": 0.1}, "weight_decay=0.1"),
        ("Adafactor", {}, "moves elements whose gradient is 0"),
        ("Muon", {}, "moves elements whose gradient is 0"),
    ],
)
def test_refused(name: str, options: dict, why: str) -> None:
    p = Parameter(torch.ones(4, 2))
    optimizer = getattr(triton_optim, name)([p], **options)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    p.grad = gradient((4, 2), [1])
    with pytest.raises(RuntimeError, match=why):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 2))
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_a_decay_that_a_schedule_brings(name: str) -> None:
    """With which single rows do no longer: SGD moves all elements, and Adagrad refuses, as from the start."""
    p = Parameter(torch.ones(4, 2))
    optimizer = getattr(triton_optim, name)([p], lr=0.1)
    for _ in range(2):
        p.grad = gradient((4, 2), [1])
        optimizer.step()
    assert torch.equal(p[0], torch.ones(2))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    p.grad = gradient((4, 2), [1])
    if name == "SGD":
        optimizer.step()
        torch.testing.assert_close(p[0].detach(), torch.full((2,), 0.95))
    else:
        with pytest.raises(RuntimeError, match=r"weight_decay=0\.5"):
            optimizer.step()
        assert torch.equal(p[0], torch.ones(2))


def test_sparse_adam_refuses_dense_gradients() -> None:
    p = Parameter(torch.ones(4, 2))
    optimizer = triton_optim.SparseAdam([p])
    p.grad = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 2))
    assert not optimizer.state


def test_sparse_adam_runs_eagerly_only() -> None:
    with pytest.raises(RuntimeError, match="sparse"):
        triton_optim.SparseAdam([Parameter(torch.ones(4, 2))], backend="compiled")


def test_explained() -> None:
    p, q = Parameter(torch.ones(4, 2)), Parameter(torch.ones(3))
    optimizer = triton_optim.SGD([p, q], backend="auto")
    p.grad, q.grad = gradient((4, 2), [1]), torch.ones(3)
    optimizer.step()
    reasons = {report.elements: report.reason for report in triton_optim.explain(optimizer)}
    assert "sparse" in reasons[8]
    assert "sparse" not in reasons[3]


def test_a_rate_of_zero() -> None:
    """A first step that might be a probe of the states is looked at."""
    p = Parameter(torch.ones(4, 2))
    optimizer = triton_optim.SGD([p], lr=0.0)
    p.grad = gradient((4, 2), [1])
    optimizer.step()
    assert torch.equal(p, torch.ones(4, 2))


@each_row
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("entries", [0, 1, 2])
def test_no_sparse_dimension(name: str, options: dict, shape: tuple[int, ...], entries: int) -> None:
    """As the gradient of a 0-dim parameter is, and of any that has only dense dimensions."""
    places = torch.zeros((0, entries), dtype=torch.long)
    steps = [
        [torch.sparse_coo_tensor(places, torch.randn(entries, *shape), shape, check_invariants=True)] for _ in range(3)
    ]
    ((p,), mine), ((q,), torchs) = side_by_side(name, options, [torch.randn(shape)], steps)
    torch.testing.assert_close(p, q)
    for key, value in torchs.state[q].items():
        if value is not None:
            torch.testing.assert_close(mine.state[p][key], value)


def test_no_sparse_dimension_and_an_average() -> None:
    p = Parameter(torch.tensor(2.0))
    optimizer = triton_optim.SparseAdam([p], lr=0.5, ema_decay=0.5)
    seen = []
    for _ in range(2):
        p.grad = torch.ones(()).to_sparse()
        optimizer.step()
        seen.append(p.item())
    with optimizer.averaged_parameters():
        assert p.item() == pytest.approx(sum(seen) / 2)
