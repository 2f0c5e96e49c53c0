"""What a training loop may do with any torch.optim.Optimizer it may do with ours, and gets what torch gives.

Ours and torch's optimizer take equal parameters and equal gradients through the same handling, side by side.
"""

import copy

import pytest
import torch
from side_by_side import (
    assert_equal,
    assert_same,
    backward,
    give_grads,
    ours,
    peer,
    side_by_side,
    train,
    values,
)
from table import (
    CASES,
    KINDS,
    each_case,
    each_case_and_backend,
    each_kind,
    each_kind_and_backend,
    rows,
    rows_and_backends,
)

BY_NAME = {case.name: case for case in CASES}
ADAMW = BY_NAME["AdamW"]
COUNTING = [case for case in KINDS if case.counts_steps]
# Where the test makes the gradients itself, and how they lie is the point.
DENSE = [case for case in KINDS if not case.sparse]


def scaled(group, factor):
    """The hyperparameters of a group that are fractions, or tuples of them, each times `factor`."""

    def times(value):
        return value * factor if isinstance(value, float) else value

    numbers = {k: v for k, v in group.items() if isinstance(v, float) or (isinstance(v, tuple) and k != "params")}
    return {k: tuple(map(times, v)) if isinstance(v, tuple) else times(v) for k, v in numbers.items()}


# Arguments and parameter groups


@each_case
def test_group_keys_are_torchs(case):
    """A key of our own, `backend` among them, would travel to torch in every checkpoint."""
    params = case.parameters()
    opt = ours(case, params)
    assert set(opt.param_groups[0]) == set(peer(case, params).param_groups[0])
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.backend == "eager"


@each_kind
@pytest.mark.parametrize("collection", [list, tuple, iter, lambda params: (p for p in params)])
def test_parameters_may_come_in_any_ordered_collection(case, collection, device):
    params = case.parameters(device)
    assert [id(p) for p in ours(case, collection(params)).param_groups[0]["params"]] == [id(p) for p in params]


def factor_of(case):
    """What hyperparameters can be multiplied by: some must not fall below 1."""
    return 1.25 if case.name in ("Rprop", "Adafactor") else 0.75


@each_kind_and_backend
def test_groups_with_their_own_hyperparameters(case, backend, device):
    second = scaled(ours(case, case.parameters()).param_groups[0], factor_of(case))
    assert second["lr"] == factor_of(case) * case.settings["lr"]

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], **second}]

    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, groups(params), backend), peer(case, groups(theirs))
    train(case, range(3), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


@each_kind_and_backend
def test_group_added_between_steps(case, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params[:1], backend), peer(case, theirs[:1])
    train(case, range(2), (params, opt), (theirs, torchs))
    assert_equal(params[1:], theirs[1:])
    opt.add_param_group({"params": params[1:-1], "lr": 5e-2})
    torchs.add_param_group({"params": theirs[1:-1], "lr": 5e-2})
    opt.add_param_group({"params": params[-1]})  # a tensor alone
    torchs.add_param_group({"params": theirs[-1]})
    train(case, range(2, 5), (params, opt), (theirs, torchs))
    assert len(opt.param_groups) == 3
    assert_same(case, opt, torchs)


@each_kind_and_backend
def test_groups_edited_in_place(case, backend, device):
    """Appended to and popped behind the optimizer's back, as pruning and unfreezing code does."""
    params, theirs = case.parameters(device), case.parameters(device)
    pairs = []
    for build, model in ((lambda p: ours(case, p, backend), params), (lambda p: peer(case, p), theirs)):
        pairs.append((model, build([{"params": model[:1]}, {"params": model[1:2]}])))
    train(case, range(2), *pairs)
    for model, opt in pairs:
        opt.param_groups[0]["params"].append(model[3])
        give_grads(case, 2, model)
        opt.zero_grad()
        assert [p.grad is None for p in model] == [True, True, False, True]
    train(case, range(2, 4), *pairs)
    for _, opt in pairs:
        opt.param_groups.pop()
    train(case, range(4, 6), *pairs)
    assert_equal(params[2:3], case.parameters(device)[2:3])
    assert_same(case, pairs[0][1], pairs[1][1])
    torch.testing.assert_close(params[1], theirs[1], **case.close)  # where the popped group left it


@each_case_and_backend
def test_hyperparameters_changed_between_steps(case, backend, device):
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    started = opt.param_groups[0].copy()
    changes = [{}, *({name: value} for name, value in scaled(started, factor_of(case)).items())]
    for step, change in enumerate([*changes, {"lr": 0.0}, {"lr": 1e-3}]):
        for group in opt.param_groups + torchs.param_groups:
            group.update(change)
        train(case, [step], (params, opt), (theirs, torchs))
        assert_same(case, opt, torchs)


@rows(*(case for case in KINDS if case.peer_takes("maximize")))
def test_maximize_changed_between_steps(case, device):
    params, opt, theirs, torchs = side_by_side(case, "eager", device)
    for step, maximize in enumerate((False, True, False)):
        for group in opt.param_groups + torchs.param_groups:
            group["maximize"] = maximize
        train(case, [step], (params, opt), (theirs, torchs))
        assert_same(case, opt, torchs)


def test_flags_of_sgd_changed_between_steps(backend, device):
    case = BY_NAME["SGD"]
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    changes = [{}, {"nesterov": True}, {"nesterov": False, "dampening": 0.5}, {"momentum": 0.0}, {"momentum": 0.9}]
    for step, change in enumerate(changes):
        for group in opt.param_groups + torchs.param_groups:
            group.update(change)
        train(case, [step], (params, opt), (theirs, torchs))
        assert_same(case, opt, torchs)


# Which parameters


@each_kind
def test_parameter_in_two_groups_is_refused(case, device):
    p, q = case.parameters(device)[:2]
    with pytest.raises(ValueError, match="more than one parameter group"):
        ours(case, [{"params": [p]}, {"params": [p]}])
    opt = ours(case, [p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [q, p]})
    assert len(opt.param_groups) == 1


# torch's SGD with momentum begins a buffer for each place; ours keeps one.
@pytest.mark.parametrize(
    ("case", "unpinned"), [*((case, "eager") for case in KINDS if case.name != "SGD"), (ADAMW, "auto")]
)
def test_parameter_twice_in_a_group_is_stepped_twice(case, unpinned, device):
    """torch warns, then updates it once for each time it is listed, one after the other."""
    params, theirs = case.parameters(device)[:2], case.parameters(device)[:2]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = ours(case, [*params, params[0]], unpinned)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        torchs = peer(case, [*theirs, theirs[0]], foreach=False)
    train(case, range(3), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


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


@each_kind_and_backend
def test_tied_parameters_are_stepped_once(case, backend, device):
    model, theirs = Tied().to(device), Tied().to(device)
    opt, torchs = ours(case, model.parameters(), backend), peer(case, theirs.parameters())
    x = torch.linspace(-1, 1, 8, device=device).reshape(2, 4)
    for _ in range(3):
        for net, optimizer in ((model, opt), (theirs, torchs)):
            optimizer.zero_grad()
            backward(case, (net(x) - 1).square().mean(), net.parameters())
            optimizer.step()
    assert len(opt.param_groups[0]["params"]) == 1
    assert model.decoder.weight is model.encoder.weight
    assert_same(case, opt, torchs)


@each_kind
def test_named_parameters(case, device):
    model, theirs = Tied().to(device), Tied().to(device)
    opt, torchs = ours(case, model.named_parameters()), peer(case, theirs.named_parameters())
    assert opt.param_groups[0]["param_names"] == torchs.param_groups[0]["param_names"] == ["encoder.weight"]
    train(case, range(2), (list(model.parameters()), opt), (list(theirs.parameters()), torchs))
    assert_same(case, opt, torchs)
    saved = opt.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["encoder.weight"]
    unnamed = ours(case, Tied().to(device).parameters())
    unnamed.load_state_dict(saved)
    assert unnamed.param_groups[0]["param_names"] == ["encoder.weight"]
    named = ours(case, Tied().to(device).named_parameters())
    del saved["param_groups"][0]["param_names"]
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["encoder.weight"]


@each_kind_and_backend
def test_frozen_parameter_with_a_gradient_left_on_it_is_stepped(case, backend, device):
    """What counts is the gradient, not requires_grad: so torch has it."""
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    for step in range(3):
        give_grads(case, step, params, theirs)
        for p in (params[0], theirs[0]):
            p.requires_grad_(step == 0)
        opt.step()
        torchs.step()
    assert not params[0].requires_grad
    assert_same(case, opt, torchs)


# GradScaler


@rows_and_backends(*DENSE)
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler_skips_and_counts_as_with_torch(case, backend, clip, device):
    """Scale, backward, (unscale, clip,) step, update: with an overflow in the first and in the fifth step."""
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    scales = []
    for model, optimizer in ((params, opt), (theirs, torchs)):
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=3)
        for step in range(7):
            optimizer.zero_grad()
            loss = sum((step + 1) * p.sin().sum() for p in model)
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
    assert_same(case, opt, torchs)


@rows(*(case for case in DENSE if case.torchs and case.peer_takes("fused")))
def test_grad_scaler_with_fused(case, device):
    """torch's fused optimizers unscale and skip inside the step. Whoever asks for `fused` gets the same numbers."""
    params, opt, theirs, torchs = side_by_side(case, "auto", device, fused=True)
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
    assert_same(case, opt, torchs)
