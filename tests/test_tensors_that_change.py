"""Hyperparameters that are tensors; parameters, states and counts that are written or replaced between steps."""

import collections
import copy
import weakref

import pytest
import torch
from side_by_side import alive, assert_equal, assert_same, give_grads, ours, peer, side_by_side, train, values
from table import KINDS, each_case_and_backend, each_kind_and_backend, rows_and_backends
from torch.nn import Parameter

COUNTING = [case for case in KINDS if case.counts_steps]


# Tensors for hyperparameters


def exact(case):
    """The lr, betas and weight decay of a group as numbers of float32, so that a tensor and a float mean the same."""
    group = ours(case, case.parameters()).param_groups[0]

    def rounded(value):
        return tuple(map(rounded, value)) if isinstance(value, tuple) else torch.tensor(value).item()

    return {name: rounded(group[name]) for name in ("lr", "betas", "weight_decay") if name in group}


@each_case_and_backend
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_lr_betas_and_weight_decay_as_tensors(case, backend, shape, device):
    def tensors(value):
        return tuple(map(tensors, value)) if isinstance(value, tuple) else torch.full(shape, value)

    settings = {name: tensors(value) for name, value in exact(case).items()}
    kept = copy.deepcopy(settings)
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend, **settings), peer(case, theirs, **exact(case))
    train(case, range(3), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)
    assert opt.param_groups[0]["lr"] is settings["lr"]  # the user's own, to write into
    torch.testing.assert_close(settings, kept, rtol=0, atol=0)


@each_kind_and_backend
def test_tensor_hyperparameters_written_into_between_steps(case, backend, device):
    numbers = exact(case)
    settings = {"lr": torch.tensor(numbers["lr"])}
    if "weight_decay" in numbers:
        settings["weight_decay"] = torch.tensor([numbers["weight_decay"]])
    if "betas" in numbers:
        settings["betas"] = tuple(map(torch.tensor, numbers["betas"]))
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend, **settings), peer(case, theirs, **numbers)
    train(case, range(2), (params, opt), (theirs, torchs))
    settings["lr"].mul_(4)
    changed = {"lr": 4 * numbers["lr"]}
    if "weight_decay" in numbers:
        settings["weight_decay"].fill_(0)
        changed["weight_decay"] = 0.0
    if "betas" in numbers:
        changed["betas"] = (0.5, 0.75, 0.875)[: len(numbers["betas"])]
        for tensor, beta in zip(settings["betas"], changed["betas"], strict=True):
            tensor.fill_(beta)
    torchs.param_groups[0].update(changed)
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)
    # A float in its place, and then another tensor.
    for lr in (0.25, torch.tensor([2.0**-6], dtype=torch.float64)):
        opt.param_groups[0]["lr"], torchs.param_groups[0]["lr"] = lr, float(lr)
        train(case, range(4, 6), (params, opt), (theirs, torchs))
        assert_same(case, opt, torchs)


# Tensors that change under the optimizer


@each_kind_and_backend
def test_data_replaced_between_steps(case, backend, device):
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    train(case, range(2), (params, opt), (theirs, torchs))
    old = [p.data for p in params]
    kept = values(old)
    for model in (params, theirs):
        for p in model:
            p.data = p.data * 2 + 1
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)
    assert_equal(old, kept)  # the old memory is not written to any more


@each_kind_and_backend
def test_data_freed_and_replaced_at_the_same_address(case, backend, device):
    """Allocators hand the same address out again, here to a parameter of the same size in another place."""
    params, theirs = ([Parameter(torch.full((16, 4), i + 1.0, device=device)) for i in range(3)] for _ in range(2))
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    for step in range(6):
        give_grads(case, step, params, theirs)
        opt.step()
        torchs.step()
        for model in (params, theirs):
            contents = [p.detach().clone() for p in model]
            for p in model:
                p.data = torch.empty(0, device=device)
                p.grad = None
            for p, content in zip(reversed(model), reversed(contents), strict=True):
                p.data = content.clone()
    assert_same(case, opt, torchs)


@each_kind_and_backend
def test_state_replaced_or_cleared_starts_afresh(case, backend, device):
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    ways = (
        lambda o, model: setattr(o, "state", collections.defaultdict(dict)),
        lambda o, model: o.state.clear(),
        lambda o, model: o.state.pop(model[0]),
        lambda o, model: o.state.__delitem__(model[1]),
        lambda o, model: o.state.__setitem__(model[3], {}),
    )
    train(case, range(2), (params, opt), (theirs, torchs))
    for i, reset in enumerate(ways):
        reset(opt, params)
        reset(torchs, theirs)
        train(case, range(2 * i + 2, 2 * i + 4), (params, opt), (theirs, torchs))
        assert_same(case, opt, torchs)


@each_kind_and_backend
def test_state_written_by_the_user_counts(case, backend, device):
    """In place, and by putting another tensor there."""
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    train(case, range(2), (params, opt), (theirs, torchs))
    for optimizer, model in ((opt, params), (torchs, theirs)):
        for name in opt.state[params[0]].keys() - case.numbers.keys():
            optimizer.state[model[0]][name].mul_(3)
        for name in opt.state[params[1]].keys() - case.numbers.keys():
            optimizer.state[model[1]][name] = optimizer.state[model[1]][name] * 3
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


@rows_and_backends(*COUNTING)
def test_step_count_put_there_by_the_user_counts(case, backend, device):
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    train(case, range(2), (params, opt), (theirs, torchs))
    for optimizer, model in ((opt, params), (torchs, theirs)):
        optimizer.state[model[0]]["step"] = torch.tensor(10.0)
        optimizer.state[model[1]]["step"] = torch.tensor(20.0)
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)
    assert [opt.state[p]["step"].item() for p in params] == [12, 22, 4, 4]


@rows_and_backends(*COUNTING)
def test_step_count_written_in_place_by_the_user_counts(case, backend, device):
    """Counts share memory: what is written in place counts for all that step together (see RuleOptimizer)."""
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    train(case, range(2), (params, opt), (theirs, torchs))
    for optimizer, model in ((opt, params), (torchs, theirs)):
        for p in model:
            optimizer.state[p]["step"].fill_(10)
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


@each_kind_and_backend
def test_parameter_object_replaced_in_its_group(case, backend, device):
    """Growing a parameter in mid-training, as Gaussian splatting does: a new Parameter takes over group and state."""
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    train(case, range(2), (params, opt), (theirs, torchs))
    old = weakref.ref(params[0])
    for optimizer, model in ((opt, params), (torchs, theirs)):
        grown = Parameter(torch.cat([model[0].detach(), torch.ones(2, 3, device=device)]))
        state = optimizer.state.pop(model[0])
        for name, value in state.items():
            if name not in case.numbers and len(value) == 4:
                state[name] = torch.cat([value, value[:2]])
        optimizer.param_groups[0]["params"][0] = model[0] = grown
        optimizer.state[grown] = state
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)
    del grown, state, model, optimizer
    assert alive([old]) == []  # no plan keeps the replaced one alive
