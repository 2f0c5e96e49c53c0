"""Clipping of gradients that are sparse, sharded, or have no memory of their own."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from clipped import ORDERS, assert_within_2_ulp, exact, random, torchs_norm, torchs_value, with_grads
from sharding import array, playing, sharded
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore
from two_tensor import TwoTensor, parameter, value_of

import triton_optim
from triton_optim import clip_grad_norm_, clip_grad_value_
from triton_optim.backends.norms import partial_norms
from triton_optim.buckets.gradient_norm import Norm, norm_from, on_one_device

# Sparse gradients


def sparse_param(device: Any) -> tuple[Parameter, Tensor]:
    """A parameter whose sparse gradient gives row 1 twice, and the same gradient, dense."""
    values = random((3, 2), device=device)
    rows = torch.tensor([[1, 3, 1]], device=device)
    p = Parameter(torch.zeros(5, 2, device=device))
    p.grad = torch.sparse_coo_tensor(rows, values, (5, 2), check_invariants=True)
    return p, p.grad.to_dense()


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_sparse_gradients_are_clipped_as_the_dense_ones_that_they_mean(coalesced, order, device):
    p, dense = sparse_param(device)
    if coalesced:
        p.grad = p.grad.coalesce()
    other, beside, theirs = random((4,), device=device), *with_grads([random((4,), device=device), dense])
    norm = clip_grad_norm_([p, beside], 0.5, order)
    expected = torchs_norm([beside_of(other), theirs], 0.5, order)
    torch.testing.assert_close(norm, expected)
    assert p.grad.is_sparse
    torch.testing.assert_close(p.grad.to_dense(), theirs.grad)
    p, dense = sparse_param(device)
    clip_grad_value_([p], 0.5)
    torch.testing.assert_close(p.grad.to_dense(), dense.clamp(-0.5, 0.5))


def beside_of(g: Tensor) -> Parameter:
    return with_grads([g])[0]


def test_partial_norms_add_up_what_a_sparse_gradient_holds_twice(backend, device):
    p, dense = sparse_param(device)
    found = norm_from(on_one_device(partial_norms([p.grad], Norm(2.0), backend), dense.device), Norm(2.0))
    assert_within_2_ulp(found.float(), exact([dense], 2.0))


# Sharded parameters (DTensor)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_a_sharded_gradient_counts_as_a_whole_and_is_clipped_in_its_shards(order, device):
    full, plain = random((5, 6), device=device), random((3,), device=device, seed=1)
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = init_device_mesh(device.type, (1,))
        p = Parameter(sharded(torch.zeros_like(full), mesh, [Shard(0)]))
        p.grad = sharded(full, mesh, [Shard(0)])
        (q,) = with_grads([plain])
        norm = clip_grad_norm_([p, q], 0.5, order)
        assert not isinstance(norm, DTensor)
        assert_within_2_ulp(norm, exact([full, plain], order))
        assert isinstance(p.grad, DTensor)
        for ours, whole in ((p.grad, full), (q.grad, plain)):
            np.testing.assert_allclose(array(ours), (whole * 0.5 / norm).cpu().numpy(), rtol=1e-5)
    finally:
        dist.destroy_process_group()


def test_a_replicated_gradient_is_counted_once_and_placed_as_its_parameter(device):
    full = random((8, 6), device=device)
    for rank in range(4):
        with playing(rank, device) as mesh:
            p = Parameter(sharded(torch.zeros_like(full), mesh, [Replicate()]))
            p.grad = sharded(full, mesh, [Replicate()])
            assert_within_2_ulp(clip_grad_norm_([p], 1.0), exact([full], 2.0))
            p = Parameter(sharded(torch.zeros_like(full), mesh, [Shard(0)]))
            p.grad = sharded(full, mesh, [Replicate()])
            clip_grad_value_([p], 0.5)
            assert p.grad.placements == (Shard(0),)
            own = full.chunk(4)[rank].clamp(-0.5, 0.5)
            np.testing.assert_array_equal(array(p.grad), own.double().cpu().numpy())


# Tensors without memory of their own


def wrapped(i: int, device: Any) -> Tensor:
    """Of its two tensors, the second is 3 times the first where `i` is odd."""
    first = random((4, 3 + i), device=device, seed=i)
    return TwoTensor(first, first * 3 if i % 2 else first.clone())


@pytest.mark.parametrize("order", [*ORDERS, 0.0, -1.0])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_wrapper_subclasses_are_clipped_as_by_torch(order, foreach, device):
    gradients = [wrapped(i, device) for i in range(3)]
    ours, theirs = (with_grads([TwoTensor(g.first.clone(), g.second.clone()) for g in gradients]) for _ in range(2))
    largest = {-1.0: 1e-3, 2.0: 9.0}.get(order, 0.5)  # with 9 only the second tensors are clipped
    norm, expected = clip_grad_norm_(ours, largest, order, foreach=foreach), torchs_norm(theirs, largest, order)
    torch.testing.assert_close([norm.first, norm.second], [expected.first, expected.second])
    for p, q, g in zip(ours, theirs, gradients, strict=True):
        assert not torch.equal(p.grad.second, g.second)
        torch.testing.assert_close([p.grad.first, p.grad.second], [q.grad.first, q.grad.second])


@pytest.mark.parametrize("foreach", [None, True, False])
def test_wrapper_subclasses_among_others(foreach, device):
    """Each is multiplied once."""
    gradients = [random((4, 3 + i), device=device, seed=i) for i in range(4)]
    theirs = with_grads(gradients)
    expected = torchs_norm(theirs, 0.5)
    ours = with_grads([TwoTensor(g.clone()) if i % 2 else g.clone() for i, g in enumerate(gradients)])
    assert float(clip_grad_norm_(ours, 0.5, foreach=foreach)) == pytest.approx(float(expected))
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(value_of(p.grad) if i % 2 else p.grad, q.grad)
    clip_grad_value_(ours, 0.01, foreach=foreach)
    torchs_value(theirs, 0.01)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(value_of(p.grad) if i % 2 else p.grad, q.grad)


def test_a_step_that_limits_the_norm_of_wrapper_subclasses(device):
    ends, norms = [], []
    for wraps in (False, True):
        values = [random((4, 3 + i), device=device, seed=i) for i in range(3)]
        params = [parameter(v) if wraps and i != 1 else Parameter(v.clone()) for i, v in enumerate(values)]
        optimizer = triton_optim.SGD(params, lr=1.0, momentum=0.9, max_grad_norm=0.5, backend="eager")
        for step in range(2):
            for i, p in enumerate(params):
                g = random(p.shape, device=device, seed=10 * step + i)
                p.grad = TwoTensor(g) if wraps and i != 1 else g
            optimizer.step()
        norms.append(optimizer.grad_norm)
        ends.append([value_of(p) if wraps and i != 1 else p.detach() for i, p in enumerate(params)])
    assert [type(norm) for norm in norms] == [Tensor, Tensor]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(*ends)
