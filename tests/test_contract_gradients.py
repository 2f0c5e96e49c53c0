"""What a training loop may do with gradients it may do with ours, and gets what torch gives: side by side."""

import weakref

import pytest
import torch
from side_by_side import (
    alive,
    assert_equal,
    assert_same,
    give_grads,
    ours,
    peer,
    side_by_side,
    state_of,
    train,
    values,
)
from table import (
    CASES,
    KINDS,
    each_kind,
    each_kind_and_backend,
    rows_and_backends,
)

ADAMW = next(case for case in CASES if case.name == "AdamW")
# Where the test makes the gradients itself, and how they lie is the point.
DENSE = [case for case in KINDS if not case.sparse]


@each_kind_and_backend
def test_gradients_that_come_and_go(case, backend, device):
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    for step, missing in enumerate([(0, 2), (), (1, 2, 3), (0, 1, 2, 3), (2,), (2, 3), ()]):
        give_grads(case, step, params, theirs, missing=missing)
        opt.step()
        torchs.step()
        assert_same(case, opt, torchs)


@each_kind_and_backend
def test_no_gradients_at_all_change_nothing(case, backend, device):
    params = case.parameters(device)
    opt = ours(case, params, backend)
    start = state_of(opt)
    assert opt.step() is None
    assert_equal(params, case.parameters(device))
    torch.testing.assert_close(state_of(opt), start, rtol=0, atol=0)
    give_grads(case, 0, params)
    opt.step()
    before, state = values(params), state_of(opt)
    opt.zero_grad()
    opt.step()
    assert_equal(params, before)
    torch.testing.assert_close(state_of(opt), state, rtol=0, atol=0)


@rows_and_backends(*DENSE)
def test_gradients_keep_their_place_change_in_place_or_change_layout(case, backend, device):
    """Each way that a cached address of a gradient can be right, or go stale."""
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    give_grads(case, 0, params, theirs)
    for change in ("none", "in place", "data", "transposed", "new", "strided", "new"):
        for model in (params, theirs):
            for p in model:
                other = torch.linspace(-1, 2, p.numel()).reshape(p.shape).to(p)
                if change == "in place":
                    p.grad.mul_(-2).add_(0.5)
                elif change == "data":
                    p.grad.data = p.grad.data * 3 - 1
                elif change == "transposed":
                    backwards = tuple(reversed(range(p.dim())))
                    p.grad = other.permute(backwards).contiguous().permute(backwards)
                elif change == "strided":
                    p.grad = torch.stack([torch.full_like(other, torch.nan), other], dim=-1)[..., 1]
                elif change == "new":
                    p.grad = -other
        opt.step()
        torchs.step()
        assert_same(case, opt, torchs)


@each_kind_and_backend
@pytest.mark.parametrize("maximize", [False, True])
def test_step_leaves_gradients_random_numbers_and_leaves_as_they_are(case, backend, maximize, device):
    params = case.parameters(device)
    opt = ours(case, params, backend, maximize=maximize)
    for step in range(2):
        give_grads(case, step, params)
        grads, random = [p.grad for p in params], torch.get_rng_state()
        before = values(grads)
        opt.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_equal(grads, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(p.is_leaf and p.requires_grad for p in params)
        assert torch.is_grad_enabled()


@each_kind_and_backend
def test_backward_after_a_step_in_between_is_refused_as_in_torch(case, backend, device):
    """Kernels write behind autograd's back: unless the version is counted up, backward would be silently wrong."""
    for make in (lambda p: peer(case, p), lambda p: ours(case, p, backend)):
        params = case.parameters(device)[:1]
        opt = make(params)
        for step in range(2):
            loss = params[0].square().sum()
            give_grads(case, step, params)
            opt.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@each_kind_and_backend
def test_gradients_dropped_by_zero_grad_are_freed(case, backend, device):
    """A plan that holds on to them would cost as much memory as the model."""
    params = case.parameters(device)
    opt = ours(case, params, backend)
    for step in range(2):
        give_grads(case, step, params)
        opt.step()
    held = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    assert alive(held) == []


def test_deleted_optimizer_frees_its_parameters_and_states(backend, device):
    """No cache may keep a model alive."""
    params = ADAMW.parameters(device)
    opt = ours(ADAMW, params, backend)
    train(ADAMW, range(2), (params, opt))
    held = [weakref.ref(p) for p in params] + [weakref.ref(opt)]
    held += [weakref.ref(value) for p in params for value in opt.state[p].values()]
    assert all(reference() is not None for reference in held[:5])
    del opt, params
    assert alive(held) == []


@pytest.mark.parametrize(
    ("case", "options"), [*((case, {}) for case in KINDS), (ADAMW, {"foreach": True}), (ADAMW, {"fused": True})]
)
def test_zero_grad_both_ways(case, options, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, "auto" if options else "eager", **options), peer(case, theirs, **options)
    give_grads(case, 0, params, theirs)
    grads = [p.grad for p in params]
    opt.zero_grad(set_to_none=False)
    torchs.zero_grad(set_to_none=False)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(not g.to_dense().any() for g in grads)
    # A gradient of zero is a step like any other; None is none.
    opt.step()
    torchs.step()
    assert_same(case, opt, torchs)
    opt.zero_grad()
    assert all(p.grad is None for p in params)


@each_kind
def test_zero_grad_detaches_a_gradient_that_has_a_graph(case, device):
    (p,) = case.parameters(device)[:1]
    opt = ours(case, [p])
    (g,) = torch.autograd.grad(p.square().sum(), p, create_graph=True)
    p.grad = g
    opt.zero_grad(set_to_none=False)
    assert p.grad is g
    assert not g.requires_grad
    assert not g.any()
