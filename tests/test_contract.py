"""What a training loop may do with any torch.optim.Optimizer it may do with ours, and gets what torch gives.

Ours and torch's optimizer take equal parameters and equal gradients through the same handling, side by side. Lion,
which torch lacks, stands beside the twenty lines of `PaperLion`.
"""

import collections
import copy
import gc
import importlib.util
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import triton_optim as to


class PaperLion(torch.optim.Optimizer):
    """Chen et al. 2023, Algorithm 2, https://arxiv.org/abs/2302.06675, in torch's words."""

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        *,
        maximize=False,
        foreach=None,
        fused=None,
        capturable=False,
        differentiable=False,
    ):
        options = {"foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable}
        hyperparameters = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, hyperparameters | options)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (beta1 * m + (1 - beta1) * g).sign()
                p.copy_(p - group["lr"] * (update + group["weight_decay"] * p))
                m.copy_(beta2 * m + (1 - beta2) * g)
        return loss


PEERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "Lion": PaperLion}
# One setting for each, so that the compiled backend compiles each rule once for all these tests.
SETTINGS = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "Adam": {"lr": 1e-2, "weight_decay": 0.1},
    "SGD": {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9},
    "Lion": {"lr": 1e-2, "weight_decay": 0.1},
}
SHAPES = ((4, 3), (5,), (0,), ())
# float32 against float32 after a few steps on values of order 1: each side rounds, in its own order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

each_optimizer = pytest.mark.parametrize("name", list(PEERS))
# For cases that name their backend; tests with an argument `backend` run on each.
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# Where the backend has no part in the result.
AUTO = "auto"


def leaves(device, dtype=torch.float32, shapes=SHAPES):
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in shapes]


def give_grads(step, *models, missing=()):
    """Each list of parameters gets the same gradients, in tensors of its own that are new at each step."""
    for params in models:
        random = torch.Generator().manual_seed(1000 + step)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=random)
            p.grad = None if i in missing else g.to(p)


def ours(name, params, backend=AUTO, **settings):
    return getattr(to, name)(params, **(SETTINGS[name] | settings), backend=backend)


def peer(name, params, **settings):
    return PEERS[name](params, **(SETTINGS[name] | settings))


def side_by_side(name, backend, device, **settings):
    """Parameters and optimizer of ours, then of torch's."""
    params, theirs = leaves(device), leaves(device)
    return params, ours(name, params, backend, **settings), theirs, peer(name, theirs, **settings)


def assert_same(opt, theirs, **tolerance):
    """Equal parameters and states; the same state keys; equal step counts, exactly."""
    tolerance = tolerance or CLOSE
    for group, their_group in zip(opt.param_groups, theirs.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], their_group["params"], strict=True)):
            torch.testing.assert_close(p, q, **tolerance, msg=lambda m, i=i: f"parameter {i}: {m}")
            state, their_state = opt.state.get(p, {}), theirs.state.get(q, {})
            assert set(state) == set(their_state), f"state keys of parameter {i}"
            for key, value in their_state.items():
                exactly = {"rtol": 0, "atol": 0} if key == "step" else tolerance
                torch.testing.assert_close(
                    state[key], value, **exactly, msg=lambda m, i=i, key=key: f"{key} of {i}: {m}"
                )


def train(steps, *pairs):
    for step in steps:
        give_grads(step, *(params for params, _ in pairs))
        for _, opt in pairs:
            opt.step()


def alive(references):
    if any(reference() is not None for reference in references):
        gc.collect()  # a quarter of a second, so only where counting references has not done it
    return [i for i, reference in enumerate(references) if reference() is not None]


def values(params):
    return [p.detach().clone() for p in params]


def assert_equal(tensors, expected):
    torch.testing.assert_close(list(tensors), list(expected), rtol=0, atol=0)


# Arguments and parameter groups


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_arguments_orders_and_defaults_are_torchs(name):
    arguments = inspect.signature(getattr(to, name)).parameters
    theirs = inspect.signature(PEERS[name]).parameters
    by_position = [a.name for a in theirs.values() if a.kind is a.POSITIONAL_OR_KEYWORD]
    assert [a.name for a in arguments.values() if a.kind is a.POSITIONAL_OR_KEYWORD] == by_position
    # Through the constructor, since keywords may be passed on to a base class.
    p = Parameter(torch.zeros(1))
    for argument in theirs.values():
        if argument.name != "params":
            getattr(to, name)([p], **{argument.name: argument.default})
    opt, torchs = getattr(to, name)([p]), PEERS[name]([p])
    assert {key: opt.defaults[key] for key in torchs.defaults} == torchs.defaults


@each_optimizer
def test_group_keys_are_torchs(name):
    """A key of our own, `backend` among them, would travel to torch in every checkpoint."""
    p = Parameter(torch.zeros(1))
    opt = ours(name, [p], "eager")
    assert set(opt.param_groups[0]) == set(peer(name, [p]).param_groups[0])
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.backend == "eager"


@each_optimizer
@pytest.mark.parametrize("collection", [list, tuple, iter, lambda params: (p for p in params)])
def test_parameters_may_come_in_any_ordered_collection(name, collection, device):
    params = leaves(device)
    assert [id(p) for p in ours(name, collection(params)).param_groups[0]["params"]] == [id(p) for p in params]


@each_optimizer
def test_groups_with_their_own_hyperparameters(name, backend, device):
    second = {"lr": 3e-2, "weight_decay": 0.0}
    second |= {"momentum": 0.5} if name == "SGD" else {"betas": (0.5, 0.75)}

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], **second}]

    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, groups(params), backend), peer(name, groups(theirs))
    train(range(3), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


@each_optimizer
def test_group_added_between_steps(name, backend, device):
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params[:1], backend), peer(name, theirs[:1])
    train(range(2), (params, opt), (theirs, torchs))
    assert_equal(params[1:], theirs[1:])
    opt.add_param_group({"params": params[1:-1], "lr": 5e-2})
    torchs.add_param_group({"params": theirs[1:-1], "lr": 5e-2})
    opt.add_param_group({"params": params[-1]})  # a tensor alone
    torchs.add_param_group({"params": theirs[-1]})
    train(range(2, 5), (params, opt), (theirs, torchs))
    assert len(opt.param_groups) == 3
    assert_same(opt, torchs)


@each_optimizer
def test_groups_edited_in_place(name, backend, device):
    """Appended to and popped behind the optimizer's back, as pruning and unfreezing code does."""
    params, theirs = leaves(device), leaves(device)
    pairs = []
    for build, model in ((lambda p: ours(name, p, backend), params), (lambda p: peer(name, p), theirs)):
        pairs.append((model, build([{"params": model[:1]}, {"params": model[1:2]}])))
    train(range(2), *pairs)
    for model, opt in pairs:
        opt.param_groups[0]["params"].append(model[3])
        give_grads(2, model)
        opt.zero_grad()
        assert [p.grad is None for p in model] == [True, True, False, True]
    train(range(2, 4), *pairs)
    for _, opt in pairs:
        opt.param_groups.pop()
    train(range(4, 6), *pairs)
    assert_equal(params[2:3], leaves(device)[2:3])
    assert_same(pairs[0][1], pairs[1][1])
    torch.testing.assert_close(params[1], theirs[1], **CLOSE)  # where the popped group left it


@each_optimizer
def test_hyperparameters_changed_between_steps(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    inertia = {"momentum": 0.5} if name == "SGD" else {"betas": (0.5, 0.75)}
    for step, change in enumerate(({}, {"lr": 0.1}, {"weight_decay": 0.0}, inertia, {"lr": 0.0}, {"lr": 1e-3})):
        for group in opt.param_groups + torchs.param_groups:
            group.update(change)
        train([step], (params, opt), (theirs, torchs))
        assert_same(opt, torchs)


@each_optimizer
def test_flags_changed_between_steps(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    changes = [{}, {"maximize": True}, {"maximize": False}]
    if name == "SGD":
        changes += [{"nesterov": True}, {"nesterov": False, "dampening": 0.5}, {"momentum": 0.0}, {"momentum": 0.9}]
    for step, change in enumerate(changes):
        for group in opt.param_groups + torchs.param_groups:
            group.update(change)
        train([step], (params, opt), (theirs, torchs))
        assert_same(opt, torchs)


# Which parameters


@each_optimizer
def test_trap_8_parameter_in_two_groups_is_refused(name, device):
    p, q = leaves(device)[:2]
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours(name, [{"params": [p]}, {"params": [p]}])
    opt = ours(name, [p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [q, p]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", ["AdamW", "Adam"])  # torch's SGD begins a buffer for each place; ours keeps one
@pytest.mark.parametrize("unpinned", ["auto", "eager"])  # only eager updates what overlaps in turn
def test_trap_8_parameter_twice_in_a_group_is_stepped_twice(name, unpinned, device):
    """torch warns, then updates it once for each time it is listed, one after the other."""
    params, theirs = leaves(device)[:2], leaves(device)[:2]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = ours(name, [*params, params[0]], unpinned)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        torchs = peer(name, [*theirs, theirs[0]], foreach=False)
    train(range(3), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


class Tied(torch.nn.Module):
    """A decoder that shares the encoder's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(4, 3, bias=False)
        self.decoder = torch.nn.Linear(4, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return torch.tanh(self.encoder(x)) @ self.decoder.weight


@each_optimizer
def test_trap_8_tied_parameters_are_stepped_once(name, backend, device):
    model, theirs = Tied().to(device), Tied().to(device)
    opt, torchs = ours(name, model.parameters(), backend), peer(name, theirs.parameters())
    x = torch.linspace(-1, 1, 8, device=device).reshape(2, 4)
    for _ in range(3):
        for net, optimizer in ((model, opt), (theirs, torchs)):
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
    assert len(opt.param_groups[0]["params"]) == 1
    assert model.decoder.weight is model.encoder.weight
    assert_same(opt, torchs)


@each_optimizer
def test_named_parameters(name, device):
    model, theirs = Tied().to(device), Tied().to(device)
    opt, torchs = ours(name, model.named_parameters()), peer(name, theirs.named_parameters())
    assert opt.param_groups[0]["param_names"] == torchs.param_groups[0]["param_names"] == ["encoder.weight"]
    train(range(2), (list(model.parameters()), opt), (list(theirs.parameters()), torchs))
    assert_same(opt, torchs)
    saved = opt.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["encoder.weight"]
    unnamed = ours(name, Tied().to(device).parameters())
    unnamed.load_state_dict(saved)
    assert unnamed.param_groups[0]["param_names"] == ["encoder.weight"]
    named = ours(name, Tied().to(device).named_parameters())
    del saved["param_groups"][0]["param_names"]
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["encoder.weight"]


@each_optimizer
def test_frozen_parameter_with_a_gradient_left_on_it_is_stepped(name, backend, device):
    """What counts is the gradient, not requires_grad: so torch has it."""
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    for step in range(3):
        give_grads(step, params, theirs)
        for p in (params[0], theirs[0]):
            p.requires_grad_(step == 0)
        opt.step()
        torchs.step()
    assert not params[0].requires_grad
    assert_same(opt, torchs)


# Gradients


@each_optimizer
def test_trap_2_gradients_that_come_and_go(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    for step, missing in enumerate([(0, 2), (), (1, 2, 3), (0, 1, 2, 3), (2,), (2, 3), ()]):
        give_grads(step, params, theirs, missing=missing)
        opt.step()
        torchs.step()
        assert_same(opt, torchs)


@each_optimizer
def test_no_gradients_at_all_change_nothing(name, backend, device):
    params = leaves(device)
    opt = ours(name, params, backend)
    assert opt.step() is None
    assert_equal(params, leaves(device))
    assert not opt.state_dict()["state"]
    give_grads(0, params)
    opt.step()
    before, state = values(params), copy.deepcopy(opt.state_dict()["state"])
    opt.zero_grad()
    opt.step()
    assert_equal(params, before)
    torch.testing.assert_close(opt.state_dict()["state"], state, rtol=0, atol=0)


@each_optimizer
def test_gradients_keep_their_place_change_in_place_or_change_layout(name, backend, device):
    """Each way that a cached address of a gradient can be right, or go stale (trap 3)."""
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    give_grads(0, params, theirs)
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
        assert_same(opt, torchs)


@each_optimizer
@pytest.mark.parametrize("maximize", [False, True])
def test_step_leaves_gradients_random_numbers_and_leaves_as_they_are(name, backend, maximize, device):
    params = leaves(device)
    opt = ours(name, params, backend, maximize=maximize)
    for step in range(2):
        give_grads(step, params)
        grads, random = [p.grad for p in params], torch.get_rng_state()
        before = values(grads)
        opt.step()
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
        assert_equal(grads, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(p.is_leaf and p.requires_grad for p in params)
        assert torch.is_grad_enabled()


@each_optimizer
def test_backward_after_a_step_in_between_is_refused_as_in_torch(name, backend, device):
    """Kernels write behind autograd's back: unless the version is counted up, backward would be silently wrong."""
    for make in (lambda p: peer(name, p), lambda p: ours(name, p, backend)):
        params = leaves(device)[:1]
        opt = make(params)
        for step in range(2):
            loss = params[0].square().sum()
            give_grads(step, params)
            opt.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@each_optimizer
def test_gradients_dropped_by_zero_grad_are_freed(name, backend, device):
    """A plan that holds on to them would cost as much memory as the model."""
    params = leaves(device)
    opt = ours(name, params, backend)
    for step in range(2):
        give_grads(step, params)
        opt.step()
    held = [weakref.ref(p.grad) for p in params]
    opt.zero_grad()
    assert alive(held) == []


def test_deleted_optimizer_frees_its_parameters_and_states(backend, device):
    """No cache may keep a model alive."""
    params = leaves(device)
    opt = ours("AdamW", params, backend)
    train(range(2), (params, opt))
    held = [weakref.ref(p) for p in params] + [weakref.ref(opt)]
    held += [weakref.ref(value) for p in params for value in opt.state[p].values()]
    assert all(reference() is not None for reference in held[:5])
    del opt, params
    assert alive(held) == []


@each_optimizer
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_zero_grad_both_ways(name, options, device):
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, **options), peer(name, theirs, **options)
    give_grads(0, params, theirs)
    grads = [p.grad for p in params]
    opt.zero_grad(set_to_none=False)
    torchs.zero_grad(set_to_none=False)
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert all(not g.any() for g in grads)
    # A gradient of zero is a step like any other; None is none.
    opt.step()
    torchs.step()
    assert_same(opt, torchs)
    opt.zero_grad()
    assert all(p.grad is None for p in params)


@each_optimizer
def test_zero_grad_detaches_a_gradient_that_has_a_graph(name, device):
    (p,) = leaves(device)[:1]
    opt = ours(name, [p])
    (g,) = torch.autograd.grad(p.square().sum(), p, create_graph=True)
    p.grad = g
    opt.zero_grad(set_to_none=False)
    assert p.grad is g
    assert not g.requires_grad
    assert not g.any()


# Closures and hooks


@each_optimizer
def test_closure_runs_once_with_gradients_and_its_loss_comes_back(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)

    def closure(model, calls):
        def evaluate():
            calls.append(torch.is_grad_enabled())
            for p in model:
                p.grad = None
            loss = sum(p.sin().sum() for p in model)
            loss.backward()
            return loss

        return evaluate

    calls, their_calls = [], []
    for _ in range(2):
        with torch.no_grad():
            loss = opt.step(closure(params, calls))
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(loss, torchs.step(closure(theirs, their_calls)), **CLOSE)
    assert opt.step(closure=closure(params, calls)) is not None
    torchs.step(closure=closure(theirs, their_calls))
    assert calls == [True] * 3
    assert_same(opt, torchs)


@each_optimizer
def test_any_value_of_a_closure_comes_back(name, device):
    params = leaves(device)
    opt = ours(name, params)
    give_grads(0, params)
    loss = object()
    assert opt.step(lambda: loss) is loss
    assert opt.step(lambda: 0.0) == 0.0


@each_optimizer
def test_closure_that_raises_changes_nothing(name, device):
    params = leaves(device)
    opt = ours(name, params)
    give_grads(0, params)

    def fails():
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        opt.step(fails)
    assert torch.is_grad_enabled()
    assert_equal(params, leaves(device))
    assert not opt.state_dict()["state"]


@each_optimizer
def test_step_hooks_run_once_each_in_torchs_order(name, device):
    def calls(opt, params):
        seen = []
        opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o is opt, args, kwargs)))
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o is opt, args, kwargs)))
        removed = opt.register_step_post_hook(lambda *_: seen.append("removed"))
        removed.remove()
        handles = [
            register_optimizer_step_pre_hook(lambda o, *_: seen.append(("global pre", o is opt))),
            register_optimizer_step_post_hook(lambda o, *_: seen.append(("global post", o is opt))),
        ]
        try:
            give_grads(0, params)
            opt.step()
        finally:
            for handle in handles:
                handle.remove()
        opt.step(closure=None)
        # torch passes the optimizer itself among the arguments.
        return [entry if len(entry) == 2 else (*entry[:2], [a is opt for a in entry[2]], entry[3]) for entry in seen]

    params, theirs = leaves(device), leaves(device)
    getattr(to, name)(leaves(device))  # Patched once for the class, not once for each instance.
    assert calls(ours(name, params), params) == calls(peer(name, theirs), theirs)


@each_optimizer
def test_pre_hook_takes_effect_in_that_step_and_post_hook_sees_it(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    after = []
    for model, optimizer in ((params, opt), (theirs, torchs)):

        def set_up(optimizer, args, kwargs, model=model):
            give_grads(7, model, missing=(1,))
            optimizer.param_groups[0]["lr"] *= 2

        optimizer.register_step_pre_hook(set_up)
        optimizer.register_step_post_hook(lambda *_, model=model: after.append(values(model)))
        optimizer.step()
        optimizer.step()
    assert_same(opt, torchs)
    torch.testing.assert_close(after[0], after[2], **CLOSE)
    assert_equal(after[1], params)


@each_optimizer
def test_pre_hook_may_replace_the_arguments(name, device):
    params = leaves(device)
    opt = ours(name, params)
    give_grads(0, params)
    opt.register_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: "from the hook"), kwargs))
    assert opt.step() == "from the hook"
    opt.register_step_pre_hook(lambda *_: "neither None nor a pair")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        opt.step()


@each_optimizer
def test_state_dict_hooks(name, device):
    params = leaves(device)
    opt = ours(name, params)
    train(range(1), (params, opt))
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append(("pre", o is opt)))
    opt.register_state_dict_pre_hook(lambda o: calls.append(("first pre", o is opt)), prepend=True)
    opt.register_state_dict_post_hook(lambda o, saved: calls.append(("post", set(saved))))
    replace = opt.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    assert opt.state_dict()["note"] == 1
    replace.remove()
    assert "note" not in opt.state_dict()
    assert calls == [("first pre", True), ("pre", True), ("post", {"state", "param_groups"})] * 2


@each_optimizer
def test_load_state_dict_hooks(name, device):
    params, fresh = leaves(device), leaves(device)
    opt, other = ours(name, params), ours(name, fresh)
    train(range(1), (params, opt))
    calls = []

    def halve(o, saved):
        calls.append(("pre", o is other, len(o.state)))
        saved = copy.deepcopy(saved)
        saved["param_groups"][0]["lr"] /= 2
        return saved

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda o: calls.append(("post", o is other, len(o.state))))
    other.load_state_dict(opt.state_dict())
    assert calls == [("pre", True, 0), ("post", True, len(params))]
    assert other.param_groups[0]["lr"] == SETTINGS[name]["lr"] / 2
    assert opt.param_groups[0]["lr"] == SETTINGS[name]["lr"]


@each_optimizer
def test_subclass_of_ours_steps_once_and_keeps_its_hooks(name, device):
    """Users wrap `step`; patching the class a second time would call the hooks twice in a plain step."""
    steps = []

    class Counting(getattr(to, name)):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    params, theirs = leaves(device), leaves(device)
    opt, torchs = Counting(params, **SETTINGS[name]), peer(name, theirs)
    train(range(2), (params, opt), (theirs, torchs))
    assert len(steps) == 2
    assert_same(opt, torchs)


# Copies


def pickled(params, opt):
    return pickle.loads(pickle.dumps((params, opt)))


def deepcopied(params, opt):
    return copy.deepcopy((params, opt))


@each_optimizer
@pytest.mark.parametrize("duplicate", [pickled, deepcopied])
def test_copy_in_mid_training_goes_on_alike_and_apart(name, backend, duplicate, device):
    params = leaves(device)
    opt = ours(name, params, backend)
    train(range(2), (params, opt))
    twins, twin = duplicate(params, opt)
    assert type(twin) is type(opt)
    assert twin.backend == backend
    assert all(p is q for p, q in zip(twins, twin.param_groups[0]["params"], strict=True))
    before = values(params)
    train(range(2, 4), (twins, twin))
    assert_equal(params, before)  # the original is not touched
    train(range(2, 4), (params, opt))
    assert_same(twin, opt, rtol=0, atol=0)


@each_optimizer
def test_optimizer_saved_whole_by_torch_goes_on_alike(name, device):
    params = leaves(device)
    opt = ours(name, params)
    train(range(2), (params, opt))
    file = io.BytesIO()
    torch.save((params, opt), file)
    file.seek(0)
    twins, twin = torch.load(file, weights_only=False)
    train(range(2, 4), (params, opt), (twins, twin))
    assert_same(twin, opt, rtol=0, atol=0)


@each_optimizer
def test_pickle_is_no_larger_than_torchs(name, backend, device):
    """Plans, tables and work buffers belong to the process. No state may bring others along."""
    shapes = ((32, 32),) * 6
    params, theirs = leaves(device, shapes=shapes), leaves(device, shapes=shapes)
    opt, torchs = ours(name, params, backend), peer(name, theirs)
    train(range(2), (params, opt), (theirs, torchs))
    for content in (lambda o: o, lambda o: o.state_dict()):
        assert len(pickle.dumps(content(opt))) < len(pickle.dumps(content(torchs))) + 4096
        files = io.BytesIO(), io.BytesIO()
        torch.save(content(opt), files[0])
        torch.save(content(torchs), files[1])
        assert files[0].tell() < files[1].tell() + 4096


@each_optimizer
def test_state_dict_through_a_file_with_weights_only(name, backend, device):
    params = leaves(device)
    opt = ours(name, params, backend)
    train(range(2), (params, opt))
    file = io.BytesIO()
    torch.save({"model": params, "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = saved["model"]
    other = ours(name, resumed, backend, lr=123.0)
    other.load_state_dict(saved["optimizer"])
    train(range(2, 4), (params, opt), (resumed, other))
    assert_same(other, opt, rtol=0, atol=0)


# Tensors for hyperparameters

# Powers of two: the same number in float32 and float64, so that a tensor and a float mean the same.
EXACT = {
    "AdamW": {"lr": 2**-6, "weight_decay": 2**-3, "betas": (0.875, 0.96875)},
    "Adam": {"lr": 2**-6, "weight_decay": 2**-3, "betas": (0.875, 0.96875)},
    "SGD": {"lr": 2**-6, "weight_decay": 2**-3},
    "Lion": {"lr": 2**-6, "weight_decay": 2**-3, "betas": (0.875, 0.96875)},
}


@each_optimizer
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_lr_betas_and_weight_decay_as_tensors(name, backend, shape, device):
    def tensors(value):
        return tuple(map(tensors, value)) if isinstance(value, tuple) else torch.full(shape, value)

    settings = {key: tensors(value) for key, value in EXACT[name].items()}
    kept = copy.deepcopy(settings)
    params, theirs = leaves(device), leaves(device)
    opt, torchs = ours(name, params, backend, **settings), peer(name, theirs, **EXACT[name])
    train(range(3), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    assert opt.param_groups[0]["lr"] is settings["lr"]  # the user's own, to write into
    torch.testing.assert_close(settings, kept, rtol=0, atol=0)


@each_optimizer
def test_tensor_lr_and_weight_decay_written_into_between_steps(name, backend, device):
    lr, weight_decay = torch.tensor(2.0**-6), torch.tensor([2.0**-3])
    params, theirs = leaves(device), leaves(device)
    opt = ours(name, params, backend, lr=lr, weight_decay=weight_decay)
    torchs = peer(name, theirs, **{key: EXACT[name][key] for key in ("lr", "weight_decay")})
    train(range(2), (params, opt), (theirs, torchs))
    lr.mul_(4)
    weight_decay.fill_(0)
    torchs.param_groups[0].update(lr=2.0**-4, weight_decay=0.0)
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    opt.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = 0.25  # a float in its place
    train(range(4, 6), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    opt.param_groups[0]["lr"] = torch.tensor([2.0**-6], dtype=torch.float64)
    torchs.param_groups[0]["lr"] = 2.0**-6
    train(range(6, 8), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Lion"])
def test_tensor_betas_written_into_between_steps(name, backend, device):
    params, theirs = leaves(device), leaves(device)
    opt = ours(name, params, backend, betas=(torch.tensor(0.875), torch.tensor(0.96875)))
    torchs = peer(name, theirs, betas=(0.875, 0.96875))
    train(range(2), (params, opt), (theirs, torchs))
    opt.param_groups[0]["betas"][0].fill_(0.5)
    opt.param_groups[0]["betas"][1].fill_(0.75)
    torchs.param_groups[0]["betas"] = (0.5, 0.75)
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


# GradScaler


@each_optimizer
@pytest.mark.parametrize("clip", [False, True])
def test_trap_29_grad_scaler_skips_and_counts_as_with_torch(name, backend, clip, device):
    """Scale, backward, (unscale, clip,) step, update: with an overflow in the first and in the fifth step."""
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    scales = []
    for model, optimizer in ((params, opt), (theirs, torchs)):
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=3)
        for step in range(7):
            optimizer.zero_grad()
            loss = sum((p * (step + 1)).sin().sum() for p in model)
            scaler.scale(loss).backward()
            skipped = step in (0, 4)
            if skipped:
                model[0].grad[0, 0] = float("inf")
            before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model, 0.5)
            scaler.step(optimizer)
            scaler.update()
            if skipped:
                assert_equal(model, before)
                torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
        scales.append(scaler.get_scale())
    assert scales == [512.0, 512.0]  # halved, doubled, halved
    assert_same(opt, torchs)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_trap_29_grad_scaler_with_fused(name, device):
    """torch's fused optimizers unscale and skip inside the step. Whoever asks for `fused` gets the same numbers."""
    params, opt, theirs, torchs = side_by_side(name, AUTO, device, fused=True)
    for model, optimizer in ((params, opt), (theirs, torchs)):
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(sum((p * (step + 1)).sin().sum() for p in model)).backward()
            if step == 2:
                model[0].grad[0, 0] = float("inf")
            before = values(model)
            scaler.step(optimizer)
            scaler.update()
            if step == 2:
                assert_equal(model, before)
    assert_same(opt, torchs)


# Tensors that change under the optimizer


@each_optimizer
def test_trap_3_data_replaced_between_steps(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    train(range(2), (params, opt), (theirs, torchs))
    old = [p.data for p in params]
    kept = values(old)
    for model in (params, theirs):
        for p in model:
            p.data = p.data * 2 + 1
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    assert_equal(old, kept)  # the old memory is not written to any more


@each_optimizer
def test_trap_3_data_freed_and_replaced_at_the_same_address(name, backend, device):
    """Allocators hand the same address out again, here to a parameter of the same size in another place."""
    params, theirs = ([Parameter(torch.full((64,), i + 1.0, device=device)) for i in range(3)] for _ in range(2))
    opt, torchs = ours(name, params, backend), peer(name, theirs)
    for step in range(6):
        give_grads(step, params, theirs)
        opt.step()
        torchs.step()
        for model in (params, theirs):
            contents = [p.detach().clone() for p in model]
            for p in model:
                p.data = torch.empty(0, device=device)
                p.grad = None
            for p, content in zip(reversed(model), reversed(contents), strict=True):
                p.data = content.clone()
    assert_same(opt, torchs)


@each_optimizer
def test_state_replaced_or_cleared_starts_afresh(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    ways = (
        lambda o, model: setattr(o, "state", collections.defaultdict(dict)),
        lambda o, model: o.state.clear(),
        lambda o, model: o.state.pop(model[0]),
        lambda o, model: o.state.__delitem__(model[1]),
        lambda o, model: o.state.__setitem__(model[3], {}),
    )
    train(range(2), (params, opt), (theirs, torchs))
    for i, reset in enumerate(ways):
        reset(opt, params)
        reset(torchs, theirs)
        train(range(2 * i + 2, 2 * i + 4), (params, opt), (theirs, torchs))
        assert_same(opt, torchs)


@each_optimizer
def test_state_written_by_the_user_counts(name, backend, device):
    """In place, and by putting another tensor there: moments as well as `step`."""
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    moment = "momentum_buffer" if name == "SGD" else "exp_avg"
    train(range(2), (params, opt), (theirs, torchs))
    for optimizer, model in ((opt, params), (torchs, theirs)):
        optimizer.state[model[0]][moment].mul_(3)
        optimizer.state[model[1]][moment] = optimizer.state[model[1]][moment] * 3
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_step_count_put_there_by_the_user_counts(name, backend, device):
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    train(range(2), (params, opt), (theirs, torchs))
    for optimizer, model in ((opt, params), (torchs, theirs)):
        optimizer.state[model[0]]["step"] = torch.tensor(10.0)
        optimizer.state[model[1]]["step"] = torch.tensor(20.0)
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    assert [opt.state[p]["step"].item() for p in params] == [12, 22, 4, 4]


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_step_count_written_in_place_by_the_user_counts(name, backend, device):
    """Counts share memory: what is written in place counts for all that step together (see RuleOptimizer)."""
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    train(range(2), (params, opt), (theirs, torchs))
    for optimizer, model in ((opt, params), (torchs, theirs)):
        for p in model:
            optimizer.state[p]["step"].fill_(10)
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


@each_optimizer
def test_parameter_object_replaced_in_its_group(name, backend, device):
    """Growing a parameter in mid-training, as Gaussian splatting does: a new Parameter takes over group and state."""
    params, opt, theirs, torchs = side_by_side(name, backend, device)
    train(range(2), (params, opt), (theirs, torchs))
    old = weakref.ref(params[0])
    for optimizer, model in ((opt, params), (torchs, theirs)):
        grown = Parameter(torch.cat([model[0].detach(), torch.ones(2, 3, device=device)]))
        state = optimizer.state.pop(model[0])
        for key, value in state.items():
            if key != "step":
                state[key] = torch.cat([value, torch.zeros(2, 3, device=device)])
        optimizer.param_groups[0]["params"][0] = model[0] = grown
        optimizer.state[grown] = state
    train(range(2, 4), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)
    del grown, state, model, optimizer
    assert alive([old]) == []  # no plan keeps the replaced one alive
