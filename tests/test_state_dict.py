"""Checkpoints: the same keys, shapes, dtypes and values as torch.optim's, in both directions, and bit for bit."""

import copy
import warnings

import pytest
import torch
from side_by_side import assert_equal, assert_same, give_grads, ours, peer, train, values
from state_dicts import BY_NAME, SGD, assert_same_states, model, through_a_file
from table import CASES, KINDS, each_case_and_backend, each_kind, each_kind_and_backend, rows_and_backends

import triton_optim as to

each_peer_and_backend = rows_and_backends(*(case for case in CASES if case.torchs))


def newer_keys(case):
    """Keys that torch's groups did not always have: those with a flag. Checkpoints from before then lack them."""
    group = peer(case, case.parameters()).param_groups[0]
    return [name for name, value in group.items() if isinstance(value, (bool, type(None)))]


# Both ways with torch.optim


def describe(state):
    return {
        key: (v.dtype, v.shape, v.device, v.requires_grad) if isinstance(v, torch.Tensor) else type(v)
        for key, v in state.items()
    }


@each_case_and_backend
def test_state_dict_has_the_structure_of_torchs(case, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    groups = [{"params": [0, 1]}, {"params": [2, 3], "lr": 0.5, "name": "decoder"}]
    opt, torchs = (
        make([{**group, "params": [model[i] for i in group["params"]]} for group in groups])
        for make, model in ((lambda g: ours(case, g, backend), params), (lambda g: peer(case, g), theirs))
    )
    give_grads(case, 0, params, theirs, missing=(1,))
    opt.step()
    torchs.step()
    saved, expected = opt.state_dict(), torchs.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert saved["param_groups"] == expected["param_groups"]
    assert sorted(saved["state"]) == sorted(expected["state"])
    for i, state in expected["state"].items():
        described = describe(saved["state"][i])
        assert described == describe(state)


@each_peer_and_backend
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoint_moves_in_mid_training(case, backend, direction, device):
    """One side trains, the other goes on from its checkpoint, and ends where the first does."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    (source, first), (target, second) = (params, opt), (theirs, torchs)
    if direction == "from torch":
        (source, first), (target, second) = (target, second), (source, first)
    for group in first.param_groups:
        group["lr"] = 3e-2  # must travel
    for step in range(3):
        give_grads(case, step, source, missing=(1,) if step == 1 else ())
        first.step()
    saved = through_a_file({"model": [p.detach() for p in source], "optimizer": first.state_dict()})
    with torch.no_grad():
        for p, value in zip(target, saved["model"], strict=True):
            p.copy_(value)
    second.load_state_dict(saved["optimizer"])
    assert_same_states(second.state_dict(), first.state_dict())
    assert second.param_groups[0]["lr"] == 3e-2
    train(case, range(3, 6), (source, first), (target, second))
    assert_same(case, opt, torchs)


def test_momentum_buffer_of_none_starts_with_the_next_gradient(backend, device):
    """As SGD without momentum once saved it; with momentum (from the checkpoint's group) the buffer starts there."""
    params, theirs = SGD.parameters(device), SGD.parameters(device)
    opt, torchs = ours(SGD, params, backend), peer(SGD, theirs)
    saved = torchs.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    for optimizer in (opt, torchs):
        optimizer.load_state_dict(copy.deepcopy(saved))
    train(SGD, range(3), (params, opt), (theirs, torchs))
    assert_same(SGD, opt, torchs)


def test_sgd_without_momentum_keeps_what_torchs_keeps(backend, device):
    params, theirs = SGD.parameters(device), SGD.parameters(device)
    opt, torchs = ours(SGD, params, backend, momentum=0.0), peer(SGD, theirs, momentum=0.0)
    train(SGD, range(2), (params, opt), (theirs, torchs))
    assert_same(SGD, opt, torchs)
    assert opt.state_dict()["state"] == torchs.state_dict()["state"]
    opt.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(opt.state_dict())
    train(SGD, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(SGD, opt, torchs)


@pytest.mark.parametrize(("saver", "loader"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_adam_and_adamw_read_each_others_checkpoints_as_torchs_do(saver, loader, device):
    """AdamW stays decoupled; Adam becomes what the checkpoint's group says."""
    case, saver = BY_NAME[loader], BY_NAME[saver]
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params), peer(case, theirs)
    source = case.parameters(device)
    first = ours(saver, source)
    train(case, range(2), (source, first))
    for optimizer in (opt, torchs):
        optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    assert opt.param_groups[0]["decoupled_weight_decay"] == torchs.param_groups[0]["decoupled_weight_decay"] is True
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


# To ourselves


@each_case_and_backend
def test_reload_inside_the_loop_changes_nothing(case, backend, device):
    """Saved and loaded at every step, by the same optimizer and by a new one: the uninterrupted run, bit for bit."""
    params, reloaded, renewed = case.parameters(device), case.parameters(device), case.parameters(device)
    opt, same, new = ours(case, params, backend), ours(case, reloaded, backend), ours(case, renewed, backend)
    for step in range(4):
        train(case, [step], (params, opt), (reloaded, same), (renewed, new))
        same.load_state_dict(same.state_dict())
        saved = through_a_file(new.state_dict())
        new = ours(case, renewed, backend)
        new.load_state_dict(saved)
        assert_same_states(new.state_dict(), opt.state_dict())
    assert_same(case, same, opt, rtol=0, atol=0)
    assert_same(case, new, opt, rtol=0, atol=0)


@each_kind_and_backend
def test_rewind(case, backend, device):
    """An earlier state loaded into an optimizer that has gone on: what its plans cached must be dropped."""
    params = case.parameters(device)
    opt = ours(case, params, backend)
    train(case, range(2), (params, opt))
    start, saved = values(params), copy.deepcopy(opt.state_dict())
    train(case, range(2, 4), (params, opt))
    end, after = values(params), copy.deepcopy(opt.state_dict())
    with torch.no_grad():
        for p, value in zip(params, start, strict=True):
            p.copy_(value)
    opt.load_state_dict(saved)
    assert_same_states(opt.state_dict(), saved)
    train(case, range(2, 4), (params, opt))
    assert_equal(params, end)
    assert_same_states(opt.state_dict(), after)


@each_kind_and_backend
@pytest.mark.parametrize("direction", ["from eager", "to eager"])
def test_checkpoint_moves_between_backends(case, backend, direction, device):
    first, second = ("eager", backend) if direction == "from eager" else (backend, "eager")
    source, target = case.parameters(device), case.parameters(device)
    opt, other = ours(case, source, first), ours(case, target, second)
    train(case, range(2), (source, opt))
    with torch.no_grad():
        for p, q in zip(target, source, strict=True):
            p.copy_(q)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.backend == second  # the choice is the optimizer's, not the checkpoint's
    train(case, range(2, 4), (source, opt), (target, other))
    assert_same(case, other, opt)


@each_kind_and_backend
def test_pinned_backend_survives_a_checkpoint_that_asks_for_another(case, backend, device):
    """torch's own groups carry foreach and fused. They do not unpin ours."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt = ours(case, params, backend)
    torchs = peer(case, theirs, foreach=False, fused=False)
    train(case, range(1), (theirs, torchs))
    opt.load_state_dict(torchs.state_dict())
    train(case, range(1, 2), (params, opt))
    assert opt.backend == backend
    assert {bucket.backend for bucket in to.explain(opt) if bucket.elements} == {backend}


@each_kind
def test_loading_copies_groups_and_leaves_the_dict_alone(case, device):
    params, fresh = case.parameters(device), case.parameters(device)
    opt, other = ours(case, params), ours(case, fresh)
    train(case, range(1), (params, opt))
    saved = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert saved["param_groups"] == kept["param_groups"]
    assert_same_states(saved, kept)
    saved["param_groups"][0]["lr"] = 123.0
    saved["state"].clear()
    assert other.param_groups[0]["lr"] == case.settings["lr"]
    assert_same_states(other.state_dict(), kept)


@each_kind
def test_group_keys_of_the_users_own_travel(case, device):
    params = case.parameters(device)
    opt = ours(case, [{"params": params[:2], "name": "encoder"}, {"params": params[2:], "name": "decoder", "rank": 4}])
    torchs = peer(case, [{"params": case.parameters(device)[:2]}, {"params": case.parameters(device)[2:]}])
    torchs.load_state_dict(opt.state_dict())
    other = ours(case, [{"params": case.parameters(device)[:2]}, {"params": case.parameters(device)[2:]}])
    other.load_state_dict(torchs.state_dict())
    assert [group["name"] for group in other.param_groups] == ["encoder", "decoder"]
    assert other.param_groups[1]["rank"] == 4


@each_kind
def test_parameters_without_state_stay_without(case, device):
    params, fresh = case.parameters(device), case.parameters(device)
    opt, other = ours(case, params), ours(case, fresh)
    start = len(other.state)  # Adagrad's states exist before the first step
    give_grads(case, 0, params, missing=(0, 2))
    opt.step()
    other.load_state_dict(opt.state_dict())
    assert sorted(other.state_dict()["state"]) == ([0, 1, 2, 3] if start else [1, 3])


# Old and foreign forms of what we keep


@each_kind_and_backend
def test_checkpoint_without_the_newer_group_keys(case, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    train(case, range(2), (params, opt), (theirs, torchs))
    old = copy.deepcopy(torchs.state_dict())
    for key in newer_keys(case):
        del old["param_groups"][0][key]
    opt.load_state_dict(old)
    group, expected = opt.param_groups[0], torchs.param_groups[0]
    assert set(group) == set(expected)
    # torch fills SGD's fused with False. Off is off.
    assert {key: group[key] or None for key in newer_keys(case)} == {
        key: expected[key] or None for key in newer_keys(case)
    }
    train(case, range(2, 4), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


# torch.distributed.checkpoint


@pytest.fixture(scope="module")
def dcp():
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own imports
        import torch.distributed.checkpoint.state_dict as module
    return module


# It makes dense gradients.
each_dense_and_backend = rows_and_backends(*(case for case in KINDS if not case.sparse))


@each_dense_and_backend
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float lr", "tensor lr"])
def test_distributed_checkpoint_leaves_a_fresh_optimizer_fresh(case, backend, lr, dcp, device):
    """It steps a fresh optimizer with gradients of zero and lr 0, to see what states there are."""
    net, theirs, untouched = model(case, device), model(case, device), model(case, device)
    opt, torchs = ours(case, net.parameters(), backend, lr=lr), peer(case, theirs.parameters(), lr=lr)
    before, random = values(net.parameters()), torch.get_rng_state()
    saved, expected = (dcp.get_optimizer_state_dict(m, o) for m, o in ((net, opt), (theirs, torchs)))
    assert_equal(net.parameters(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())
    assert opt.param_groups[0]["lr"] is lr
    assert {key: set(state) for key, state in saved["state"].items()} == {
        key: set(state) for key, state in expected["state"].items()
    }
    for state in opt.state_dict()["state"].values():
        assert not any(value.any() for key, value in state.items() if key not in (*case.numbers, "step_size", "z"))
    # What matters: it trains as if nobody had looked.
    other = ours(case, untouched.parameters(), backend, lr=lr)
    train(case, range(3), (list(net.parameters()), opt), (list(untouched.parameters()), other))
    assert_same(case, opt, other, rtol=0, atol=0)


@each_dense_and_backend
def test_distributed_checkpoint_resumes(case, backend, dcp, device):
    net, resumed = model(case, device), model(case, device)
    opt, other = ours(case, net.parameters(), backend), ours(case, resumed.parameters(), backend)
    train(case, range(2), (list(net.parameters()), opt))
    saved = through_a_file(dcp.get_optimizer_state_dict(net, opt))
    resumed.load_state_dict(net.state_dict())
    dcp.set_optimizer_state_dict(resumed, other, saved)
    assert_same_states(other.state_dict(), opt.state_dict())
    train(case, range(2, 4), (list(net.parameters()), opt), (list(resumed.parameters()), other))
    assert_same(case, other, opt, rtol=0, atol=0)
