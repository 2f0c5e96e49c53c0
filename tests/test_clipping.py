"""Clipping by norm and by value: torch's arguments and results, the norm as exact as its dtype allows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
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

torchs_norm, torchs_value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_
ORDERS = [1.0, 2.0, 3.0, 0.5, math.inf]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
SHAPES = [(0,), (), (1,), (7,), (33, 5)]
LARGE = 20_001  # enough for a graph, and not a whole number of its rows
# A graph takes seconds to compile; these stand for the others.
COMPILED = [(1.0, torch.float32), (2.0, torch.float32), (math.inf, torch.float32), (2.0, torch.bfloat16)]


def random(shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Tensor:
    parts = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=parts).to(device, dtype)


def with_grads(gradients: list[Tensor | None]) -> list[Parameter]:
    params = []
    for g in gradients:
        params.append(Parameter(torch.zeros(3) if g is None else torch.zeros_like(g)))
        params[-1].grad = g if g is None else g.clone(memory_format=torch.preserve_format)
    return params


def exact(tensors: list[Tensor], order: float) -> float:
    """The norm in float64 by numpy."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    flat = np.abs(np.concatenate([t.detach().cpu().to(wide).numpy().reshape(-1) for t in tensors]))
    if order == math.inf:
        return float(flat.max())
    return float(math.fsum(flat**order) ** (1 / order))


def assert_within_2_ulp(norm: Tensor, expected: float) -> None:
    """Of float32; in float64, where nothing is wider, to what summation in it leaves."""
    ulp = 50 * np.spacing(expected) if norm.dtype == torch.float64 else np.spacing(np.float32(expected))
    assert abs(norm.item() - expected) <= 2 * ulp


def norm_by(tensors: list[Tensor], order: float, backend: Any) -> Tensor:
    found = norm_from(on_one_device(partial_norms(tensors, Norm(order), backend), tensors[0].device), Norm(order))
    return found if tensors[0].dtype in (torch.float64, torch.complex128) else found.float()


# The norm, by backend


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_exact_to_2_ulp(order, dtype, backend, device):
    large = backend != "compiled" or (order, dtype) in COMPILED
    gradients = [random(shape, dtype, device, i) for i, shape in enumerate([*SHAPES, *[(LARGE,)] * large])]
    assert_within_2_ulp(norm_by(gradients, order, backend), exact(gradients, order))


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_equal_elements_do_not_add_up_their_rounding(order, backend, device):
    """Each addition rounds the same way; one after the other in float32 they are hundreds of ulp off."""
    gradients = [torch.full((LARGE,), 0.1, device=device)]
    found, expected = norm_by(gradients, order, backend).item(), exact(gradients, order)
    assert abs(found - expected) <= 16 * np.spacing(np.float32(expected))


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, LARGE - 1])
def test_an_element_that_is_not_finite_is_told_and_stays_in_the_norm(order, fault, place, backend, device):
    gradients = [random((LARGE,), device=device), random((5,), device=device)]
    clean = on_one_device(partial_norms(gradients, Norm(order), backend), device)
    assert not clean[:, 1].any()
    gradients[0][place] = fault
    partials = on_one_device(partial_norms(gradients, Norm(order), backend), device)
    assert partials[:, 1].any()
    torch.testing.assert_close(norm_from(partials, Norm(order)).item(), fault, equal_nan=True)


def layouts(device: Any) -> dict[str, Tensor]:
    return {
        "transposed": random((150, 130), device=device).t(),
        "channels last": random((8, 6, 20, 21), device=device).to(memory_format=torch.channels_last),
        "every second": random((40_002,), device=device)[::2],
        "misaligned": random((LARGE + 1,), device=device)[1:],
        "expanded": random((1, 5), device=device).expand(4000, 5),
    }


@pytest.mark.parametrize("lay", list(layouts("cpu")))
def test_however_a_gradient_lies_in_memory(lay, backend, device):
    gradients = [layouts(device)[lay], random((3,), device=device)]
    assert_within_2_ulp(norm_by(gradients, 2.0, backend), exact(gradients, 2.0))


def test_the_norm_has_the_same_bits_on_every_run(backend, device):
    gradients = [random((LARGE,), device=device, seed=i) for i in range(3)]
    first = norm_by(gradients, 2.0, backend)
    assert all(torch.equal(norm_by([g.clone() for g in gradients], 2.0, backend), first) for _ in range(3))


def test_no_tensors_have_the_norm_0(backend, device):
    assert norm_from(on_one_device(partial_norms([], Norm(2.0), backend), device), Norm(2.0)) == 0
    assert norm_by([torch.zeros(0, device=device)], 2.0, backend) == 0


# clip_grad_norm_


@pytest.mark.parametrize("order", [*ORDERS, 0.0, "inf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_clipping_is_torchs(order, dtype, device):
    if order == 0 and dtype.is_complex:
        return  # of which torch's warns
    empty = order not in (math.inf, "inf")  # torch refuses one there, and counts tensors for an order of 0
    gradients = [random(shape, dtype, device, i) for i, shape in enumerate(SHAPES[not empty :])]
    ours, theirs = with_grads(gradients), with_grads(gradients)
    norm = clip_grad_norm_(ours, 0.5, norm_type=order)
    expected = torchs_norm(theirs, 0.5, norm_type=order)
    assert norm.shape == ()
    if order:
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_within_2_ulp(norm, exact(gradients, float(order)))
    half = dtype in (torch.bfloat16, torch.float16)
    tolerance = 8 * torch.finfo(dtype).eps if half else 4e-6 if dtype != torch.float64 else 1e-14
    torch.testing.assert_close(norm.double(), expected.double(), rtol=tolerance, atol=0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("size", "max_norm"), [(1e-6, 1e-6), (1e-8, 1e-7), (1.0, 0.0), (0.0, 0.0)])
def test_torchs_epsilon_is_beside_the_norm(size, max_norm, device):
    ours, theirs = (with_grads([torch.full((4,), size / 2, device=device)]) for _ in range(2))
    clip_grad_norm_(ours, max_norm)
    torchs_norm(theirs, max_norm)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-6, atol=0)


def test_what_is_short_enough_keeps_every_bit(device):
    gradients = [random(shape, device=device) for shape in SHAPES]
    params = with_grads(gradients)
    clip_grad_norm_(params, 1e6)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))


def test_dtypes_may_be_mixed_and_the_widest_decides(device):
    gradients = [random((9,), dtype, device) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    params = with_grads(gradients)
    norm = clip_grad_norm_(params, 1.0)
    assert norm.dtype == torch.float64
    wide = [g.double() for g in gradients]
    torch.testing.assert_close(norm.item(), exact(wide, 2.0), rtol=1e-15, atol=0)
    for p, g in zip(params, wide, strict=True):
        expected = (g / (norm + 1e-6)).to(p.dtype)
        torch.testing.assert_close(p.grad, expected, rtol=2 * torch.finfo(p.dtype).eps, atol=0)


def test_clipping_has_the_same_bits_on_every_run_whoever_has_no_gradient(device):
    gradients = [random((LARGE,), device=device, seed=i) for i in range(2)]
    all_there, some_missing = with_grads(gradients), with_grads([None, gradients[0], None, gradients[1], None])
    norms = [clip_grad_norm_(all_there, 1.0), clip_grad_norm_(some_missing, 1.0)]
    assert torch.equal(*norms)
    for p, q in zip(all_there, some_missing[1:4:2], strict=True):
        assert torch.equal(p.grad, q.grad)
    assert some_missing[0].grad is None


@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_generator_a_single_tensor_and_foreach_are_taken(foreach, device):
    for given in (lambda p: iter([p]), lambda p: (q for q in [p]), lambda p: p, lambda p: (p,)):
        (p,) = with_grads([torch.tensor([3.0, 4.0], device=device)])
        assert clip_grad_norm_(given(p), 1.0, foreach=foreach) == 5
        torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8], device=device))
        clip_grad_value_(given(p), 0.7, foreach=foreach)
        torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.7], device=device))


def test_without_gradients_the_norm_is_0():
    assert torch.equal(clip_grad_norm_([], 1.0), torchs_norm([], 1.0))
    params = with_grads([None, None])
    assert torch.equal(clip_grad_norm_(params, 1.0), torchs_norm(params, 1.0))
    clip_grad_value_(params, 1.0)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("clip", [torchs_norm, clip_grad_norm_, clip_grad_value_])  # at which torch's own fails
def test_an_empty_generator_is_warned_of_at_the_callers_line(clip):
    with pytest.warns(UserWarning, match="`parameters` is an empty generator, no gradient clipping") as found:
        clip((p for p in []), 1.0)
    assert [w.filename for w in found] == [__file__] or clip is torchs_norm


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", [2.0, math.inf, 1.0])
def test_gradients_that_are_not_finite_become_what_torch_makes_of_them(fault, order, device):
    gradients = [random((5,), device=device), random((LARGE,), device=device)]
    gradients[0][2] = fault
    ours, theirs = with_grads(gradients), with_grads(gradients)
    norm, expected = clip_grad_norm_(ours, 1.0, order), torchs_norm(theirs, 1.0, order)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_error_if_nonfinite_raises_torchs_error_and_writes_nothing(fault, device):
    gradients = [random((5,), device=device), random((4,), device=device)]
    gradients[1][0] = fault
    params = with_grads(gradients)
    with pytest.raises(RuntimeError) as expected:
        torchs_norm(with_grads(gradients), 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=str(fault)) as error:
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert "non-finite" in str(error.value)
    assert "non-finite" in str(expected.value)
    for p, g in zip(params, gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
    gradients[1][0] = 1.0
    clip_grad_norm_(with_grads(gradients), 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("lay", list(layouts("cpu"))[:4])
def test_gradients_are_clipped_where_they_lie(lay, device):
    g = layouts(device)[lay]
    p = Parameter(torch.zeros_like(g))
    p.grad = g
    before = g.clone()
    norm = clip_grad_norm_([p], 1.0)
    assert p.grad is g
    assert g.stride() == layouts(device)[lay].stride()
    torch.testing.assert_close(g, before / norm)


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


# clip_grad_value_


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_value_clipping_is_torchs(dtype, foreach, device):
    gradients = [None, *(random(shape, dtype, device, i) for i, shape in enumerate([*SHAPES, (LARGE,)]))]
    gradients[-1][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    gradients += [layouts(device)["transposed"], layouts(device)["channels last"]]
    ours, theirs = with_grads(gradients), with_grads(gradients)
    assert clip_grad_value_(ours, 0.7, foreach=foreach) is None
    torchs_value(theirs, 0.7)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


def test_complex_gradients_have_no_order_to_be_clipped_by():
    with pytest.raises(RuntimeError):
        torchs_value(with_grads([random((3,), torch.complex64)]), 0.5)
    with pytest.raises(RuntimeError):
        clip_grad_value_(with_grads([random((3,), torch.complex64)]), 0.5)
