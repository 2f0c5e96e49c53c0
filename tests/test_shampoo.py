"""Shampoo: sides that come later, grafting, blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from walks import BASES, OFTEN, normal, walked

import triton_optim


@pytest.mark.parametrize("case", BASES, ids=lambda case: case.name)
def test_a_side_that_comes_later_is_the_identity_until_it_turns(case: Any) -> None:
    params = [normal(4, 3), normal(4, 3)]
    optimizer = case.ours(params, **(OFTEN | {"precondition_frequency": 3}), max_precond_dim=3, backend="eager")
    g = torch.ones(4, 3, dtype=torch.float64)
    params[0].grad = g
    optimizer.step()
    optimizer.param_groups[0]["max_precond_dim"] = 4
    params[1].grad = g  # a new plan
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["Q_L"], torch.eye(4, dtype=torch.float64))
    walked(optimizer, 4)
    assert all(p.isfinite().all() for p in params)


def test_grafting_may_change() -> None:
    p = normal(4, 3)
    optimizer = triton_optim.Shampoo([p], **OFTEN, grafting="sgd", backend="eager")
    walked(optimizer, 3)
    assert "exp_avg_sq" not in optimizer.state[p]
    optimizer.param_groups[0]["grafting"] = "adam"
    walked(optimizer, 3)
    assert optimizer.state[p]["exp_avg_sq"].any()


def test_shampoos_update_is_as_long_as_adams() -> None:
    params, others = [[normal(4, 3), normal(6, 2)] for _ in range(2)]
    starts = [p.detach().clone() for p in params]
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "backend": "eager"}
    walked(triton_optim.Shampoo(params, **options, precondition_frequency=1), 1)
    walked(triton_optim.Adam(others, **options), 1)
    for p, q, start in zip(params, others, starts, strict=True):
        torch.testing.assert_close((p - start).norm(), (q - start).norm(), rtol=1e-12, atol=0)
        assert not torch.allclose(p, q, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 4), (5, 9), (4, 5, 3), (7,)])
def test_a_block_is_updated_as_a_matrix_of_its_own(shape: tuple[int, ...]) -> None:
    options = {**OFTEN, "betas": (0.8, 0.9), "precondition_1d": True, "weight_decay": 0.1, "backend": "eager"}
    p = normal(*shape)
    matrix = p.detach().view(len(p), -1).clone()
    rows, columns = (-(-n // -(-n // 4)) for n in matrix.shape)  # of the fewest blocks with sides of at most 4
    others = [Parameter(block.clone()) for row in matrix.split(rows) for block in row.split(columns, 1)]
    optimizer = triton_optim.Shampoo([p], **options, block_size=4)
    apart = triton_optim.Shampoo(others, **options)
    for step in range(5):
        random = torch.Generator().manual_seed(step)
        g = torch.randn(matrix.shape, generator=random, dtype=torch.float64)
        p.grad = g.view(shape)
        blocks = [block for row in g.split(rows) for block in row.split(columns, 1)]
        for q, block in zip(others, blocks, strict=True):
            q.grad = block.clone()
        optimizer.step()
        apart.step()
    width = -(-matrix.shape[1] // columns)
    found = torch.cat([torch.cat([*others[i : i + width]], 1) for i in range(0, len(others), width)])
    torch.testing.assert_close(p.detach().view(len(p), -1), found.detach(), rtol=1e-12, atol=1e-13)
    assert optimizer.state[p]["L"].shape == (len(others), rows, rows)
    if columns > 1:
        assert optimizer.state[p]["R"].shape == (len(others), columns, columns)


def test_preconditioners_of_blocks_are_of_the_parameters_size() -> None:
    whole, one, cut = (
        triton_optim.Shampoo([normal(16, 4)], **OFTEN, block_size=n, backend="eager") for n in (None, 16, 4)
    )
    for optimizer in (whole, one, cut):
        walked(optimizer, 3)
    ends = [next(iter(optimizer.state.items())) for optimizer in (whole, one, cut)]
    assert torch.equal(ends[0][0], ends[1][0])
    assert [own["L"].shape for _, own in ends] == [(16, 16), (16, 16), (4, 4, 4)]
    assert [own["R"].shape for _, own in ends] == [(4, 4), (4, 4), (4, 4, 4)]
    assert triton_optim.memory_report(cut).states["L"] == 16 * 4 * 8
