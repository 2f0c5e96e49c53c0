"""Sharded parameters with a gradient or a state that is placed otherwise: refused, and nothing has changed."""

import numpy as np
import pytest
import torch
from one_step import step_with
from sharding import array, own_part, playing, sharded, values
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

import triton_optim as to


def assert_refuses(opt, params):
    before = [array(p).copy() for p in params]
    with pytest.raises((RuntimeError, ValueError)):
        opt.step()
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert np.array_equal(array(p), old), f"parameter {i} was written"


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
def test_gradient_and_parameter_of_different_kinds(started, backend, device):
    with playing(1, device) as mesh:
        full = values((5, 3), 0, device)
        first = Parameter(torch.ones(2, device=device))
        for p, right, wrong in [
            (sharded(full, mesh, [Shard(0)]), sharded(full, mesh, [Shard(0)]), full),
            (full.clone(), full, sharded(full, mesh, [Replicate()])),
        ]:
            params = [first, Parameter(p)]
            opt = to.AdamW(params, backend=backend)
            if started:
                step_with(opt, params, [torch.ones_like(first), right])
            first.grad = torch.ones_like(first)
            try:
                params[1].grad = None
                params[1].grad = wrong
            except RuntimeError:  # torch refuses the assignment already
                continue
            assert_refuses(opt, params)


@pytest.mark.parametrize("kind", ["whole", "own rows", "replicated", "other dimension"])
@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
def test_state_placed_otherwise_than_its_parameter(kind, started, backend, device):
    """As after loading the state dict of an unsharded run: not one row may be taken for another."""
    with playing(1, device) as mesh:
        full = values((5, 3), 0, device)
        params = [Parameter(torch.ones(2, device=device)), Parameter(sharded(full, mesh, [Shard(0)]))]
        opt = to.AdamW(params, backend=backend)
        gradients = [torch.ones(2, device=device), sharded(full, mesh, [Shard(0)])]
        if started:
            step_with(opt, params, gradients)
        state = {
            "whole": full,
            "own rows": own_part(full, mesh, [Shard(0)]),
            "replicated": sharded(full, mesh, [Replicate()]),
            "other dimension": sharded(full, mesh, [Shard(1)]),
        }[kind]
        opt.state[params[1]]["exp_avg"] = state
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        assert_refuses(opt, params)


def test_state_on_another_dimension_of_the_mesh(backend, device):
    """Equal local shapes, other rows: this rank holds the first half of the parameter, the second of the state."""
    with playing(1, device, (2, 2)) as mesh:
        full = values((4, 3), 0, device)
        p = Parameter(sharded(full, mesh, [Shard(0), Replicate()]))
        opt = to.AdamW([p], backend=backend)
        opt.state[p]["exp_avg"] = sharded(full, mesh, [Replicate(), Shard(0)])
        assert opt.state[p]["exp_avg"].to_local().shape == p.to_local().shape
        p.grad = sharded(full, mesh, [Shard(0), Replicate()])
        assert_refuses(opt, [p])
