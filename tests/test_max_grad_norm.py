"""max_grad_norm: the norm that a step reports, and what is clipped by it."""

import math
from types import SimpleNamespace

import pytest
import torch
from amp_steps import SCALE, each_backend, give, new_scaler, parameters
from complaints import explains
from torch.nn import Parameter

import triton_optim


@pytest.mark.parametrize("norm", [0, -1, 0.0, math.nan, -math.inf])
def test_a_max_grad_norm_that_is_not_positive(norm):
    with pytest.raises(ValueError, match="max_grad_norm") as error:
        triton_optim.AdamW(parameters("cpu"), max_grad_norm=norm)
    explains(error, norm, "positive", "None")


# max_grad_norm


@each_backend
def test_grad_norm_is_torchs_and_the_step_is_of_clipped_gradients(backend, device):
    params, plain = parameters(device), parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, max_grad_norm=0.5, backend=backend)
    assert opt.grad_norm is None
    without = triton_optim.SGD(plain, lr=0.1, backend=backend)
    for k in range(3):
        give(params, k)
        give(plain, k)
        opt.step()
        expected = torch.nn.utils.clip_grad_norm_(plain, 0.5)
        without.step()
        assert opt.grad_norm.shape == ()
        assert opt.grad_norm.device.type == device.type
        torch.testing.assert_close(opt.grad_norm.float(), expected)
        assert without.grad_norm is None
    torch.testing.assert_close(params, plain)


@each_backend
def test_grad_norm_is_of_gradients_without_their_scale(backend, device):
    params = parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, amp="fused", max_grad_norm=1e9, backend=backend)
    give(params, 0, SCALE)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    scaler = new_scaler(triton_optim.GradScaler, device)
    scaler.step(opt)
    torch.testing.assert_close(opt.grad_norm.float(), norm / SCALE)


@each_backend
def test_a_norm_as_small_as_torchs_epsilon_is_clipped_by_torchs_factor(backend, device):
    """1e-6 under a limit of 1e-6 is halved."""
    p = Parameter(torch.zeros(4, device=device))
    opt = triton_optim.SGD([p], lr=1e6, max_grad_norm=1e-6, backend=backend)
    p.grad = torch.full_like(p, 5e-7)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.25))


@each_backend
def test_max_grad_norm_may_change_between_steps(backend, device):
    params, plain = parameters(device), parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, momentum=0.9, backend=backend)
    without = triton_optim.SGD(plain, lr=0.1, momentum=0.9, backend=backend)
    for k, norm in enumerate([None, 0.5, 0.1, None, 2.0]):
        opt.max_grad_norm = norm
        for own, one in ((params, opt), (plain, without)):
            give(own, k)
            if norm is not None and one is without:
                torch.nn.utils.clip_grad_norm_(own, norm)
            one.step()
        assert (opt.grad_norm is None) == (norm is None)
        torch.testing.assert_close(params, plain)


@each_backend
def test_gradients_that_are_not_finite_are_clipped_as_torch_clips_them(backend, device):
    """Without a scaler nothing is skipped: Inf makes NaN of itself and 0 of the others, NaN NaN of all."""
    for fault in (math.inf, math.nan):
        params, plain = parameters(device), parameters(device)
        opt = triton_optim.SGD(params, lr=0.1, max_grad_norm=1.0, backend=backend)
        give(params, 0, fault=fault)
        give(plain, 0, fault=fault)
        opt.step()
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        triton_optim.SGD(plain, lr=0.1, backend=backend).step()
        torch.testing.assert_close(params, plain, equal_nan=True)


def test_squares_past_float32_are_no_infinities(device):
    """A compiled norm overflows where the gradients do not; as in torch, its norm is then infinite."""
    opts = {}
    for backend in ("eager", "compiled"):
        p = Parameter(torch.zeros(40_000, device=device))
        p.grad = torch.full_like(p, 1e20)
        opts[backend] = triton_optim.SGD([p], lr=1.0, amp="fused", max_grad_norm=1.0, backend=backend)
        opts[backend].grad_scale = torch.tensor(1e20, device=device)
        opts[backend].step()
        assert opts[backend].skipped == 0
    assert float(opts["eager"].grad_norm) == pytest.approx(200)
    assert float(opts["compiled"].grad_norm) == math.inf


def test_a_norm_that_is_none_is_refused_when_it_is_set(device):
    opt = triton_optim.SGD(parameters(device), lr=0.1)
    with pytest.raises(ValueError, match="Invalid max_grad_norm: -1"):
        opt.max_grad_norm = -1
    assert opt.max_grad_norm is None


def test_what_becomes_of_gradients_is_formed_where_a_bucket_reads_it():
    """A kernel reads it on its device; there, whatever the first bucket's."""
    (p,) = params = [Parameter(torch.ones(2))]
    opt = triton_optim.SGD(params, max_grad_norm=1.0, backend="eager")
    p.grad = torch.ones(2)
    opt.step()
    plan = opt.engine.plan
    buckets = [
        SimpleNamespace(takes_stats=n > 0, key=SimpleNamespace(device=torch.device("cuda", n))) for n in range(3)
    ]
    plan.buckets = buckets
    plan._note_who_takes_stats()
    assert (plan._takes_stats, plan._stats_device) == (buckets[1], torch.device("cuda", 1))
    assert not plan._all_take_stats
