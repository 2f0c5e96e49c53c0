"""Clipping by norm and by value: torch's arguments and results, the norm as exact as its dtype allows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from clipped import ORDERS, assert_within_2_ulp, exact, random, torchs_norm, torchs_value, with_grads
from torch import Tensor
from torch.nn import Parameter

from triton_optim import clip_grad_norm_, clip_grad_value_
from triton_optim.backends.norms import partial_norms
from triton_optim.buckets.gradient_norm import Norm, norm_from, on_one_device

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
SHAPES = [(0,), (), (1,), (7,), (33, 5)]
LARGE = 20_001  # enough for a graph, and not a whole number of its rows
# A graph takes seconds to compile; these stand for the others.
COMPILED = [(1.0, torch.float32), (2.0, torch.float32), (math.inf, torch.float32), (2.0, torch.bfloat16)]


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
