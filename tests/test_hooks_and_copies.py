"""Closures, hooks and copies are those of any torch.optim.Optimizer."""

import copy
import io
import pickle

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
    state_of,
    train,
    values,
)
from table import CASES, each_kind, each_kind_and_backend, rows
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# Closures and hooks


@each_kind_and_backend
def test_closure_runs_once_with_gradients_and_its_loss_comes_back(case, backend, device):
    params, opt, theirs, torchs = side_by_side(case, backend, device)

    def closure(model, calls):
        def evaluate():
            calls.append(torch.is_grad_enabled())
            for p in model:
                p.grad = None
            loss = sum(p.sin().sum() for p in model)
            backward(case, loss, model)
            return loss

        return evaluate

    calls, their_calls = [], []
    for _ in range(2):
        with torch.no_grad():
            loss = opt.step(closure(params, calls))
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(loss, torchs.step(closure(theirs, their_calls)), **case.close)
    assert opt.step(closure=closure(params, calls)) is not None
    torchs.step(closure=closure(theirs, their_calls))
    assert calls == [True] * 3
    assert_same(case, opt, torchs)


@each_kind
def test_any_value_of_a_closure_comes_back(case, device):
    params = case.parameters(device)
    opt = ours(case, params)
    give_grads(case, 0, params)
    loss = object()
    assert opt.step(lambda: loss) is loss
    assert opt.step(lambda: 0.0) == 0.0


@each_kind
def test_closure_that_raises_changes_nothing(case, device):
    params = case.parameters(device)
    opt = ours(case, params)
    start = state_of(opt)
    give_grads(case, 0, params)

    def fails():
        raise ArithmeticError("diverged")

    with pytest.raises(ArithmeticError, match="diverged"):
        opt.step(fails)
    assert torch.is_grad_enabled()
    assert_equal(params, case.parameters(device))
    torch.testing.assert_close(state_of(opt), start, rtol=0, atol=0)


@each_kind
def test_step_hooks_run_once_each_in_torchs_order(case, device):
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
            give_grads(case, 0, params)
            opt.step()
        finally:
            for handle in handles:
                handle.remove()
        opt.step(closure=None)
        # torch passes the optimizer itself among the arguments.
        return [entry if len(entry) == 2 else (*entry[:2], [a is opt for a in entry[2]], entry[3]) for entry in seen]

    params, theirs = case.parameters(device), case.parameters(device)
    case.ours(case.parameters(device))  # Patched once for the class, not once for each instance.
    assert calls(ours(case, params), params) == calls(peer(case, theirs), theirs)


@each_kind
def test_step_hooks_of_a_subclass_with_a_step_of_its_own_run_once(case, device):
    class Own(case.ours):
        def step(self, closure=None):
            seen.append("own")
            return super().step(closure)

    seen = []
    params = case.parameters(device)
    optimizer = Own(params, **case.settings, backend="eager")
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    give_grads(case, 0, params)
    optimizer.step()
    assert seen == ["pre", "own", "post"]


@rows(*CASES[:1])
def test_a_step_is_a_range_of_the_profiler(case, device):
    params = case.parameters(device)
    optimizer = ours(case, params)
    give_grads(case, 0, params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.key for event in profile.key_averages()]
    assert f"Optimizer.step#{case.name}.step" in names


@each_kind_and_backend
def test_pre_hook_takes_effect_in_that_step_and_post_hook_sees_it(case, backend, device):
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    after = []
    for model, optimizer in ((params, opt), (theirs, torchs)):

        def set_up(optimizer, args, kwargs, model=model):
            give_grads(case, 7, model, missing=(1,))
            optimizer.param_groups[0]["lr"] *= 2

        optimizer.register_step_pre_hook(set_up)
        optimizer.register_step_post_hook(lambda *_, model=model: after.append(values(model)))
        optimizer.step()
        optimizer.step()
    assert_same(case, opt, torchs)
    torch.testing.assert_close(after[0], after[2], **case.close)
    assert_equal(after[1], params)


@each_kind
def test_pre_hook_may_replace_the_arguments(case, device):
    params = case.parameters(device)
    opt = ours(case, params)
    give_grads(case, 0, params)
    opt.register_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: "from the hook"), kwargs))
    assert opt.step() == "from the hook"
    opt.register_step_pre_hook(lambda *_: "neither None nor a pair")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        opt.step()


@each_kind
def test_state_dict_hooks(case, device):
    params = case.parameters(device)
    opt = ours(case, params)
    train(case, range(1), (params, opt))
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append(("pre", o is opt)))
    opt.register_state_dict_pre_hook(lambda o: calls.append(("first pre", o is opt)), prepend=True)
    opt.register_state_dict_post_hook(lambda o, saved: calls.append(("post", set(saved))))
    replace = opt.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    assert opt.state_dict()["note"] == 1
    replace.remove()
    assert "note" not in opt.state_dict()
    assert calls == [("first pre", True), ("pre", True), ("post", {"state", "param_groups"})] * 2


@each_kind
def test_load_state_dict_hooks(case, device):
    params, fresh = case.parameters(device), case.parameters(device)
    opt, other = ours(case, params), ours(case, fresh)
    train(case, range(1), (params, opt))
    calls, started = [], len(other.state)

    def halve(o, saved):
        calls.append(("pre", o is other, len(o.state)))
        saved = copy.deepcopy(saved)
        saved["param_groups"][0]["lr"] /= 2
        return saved

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda o: calls.append(("post", o is other, len(o.state))))
    other.load_state_dict(opt.state_dict())
    assert calls == [("pre", True, started), ("post", True, len(params))]
    assert other.param_groups[0]["lr"] == case.settings["lr"] / 2
    assert opt.param_groups[0]["lr"] == case.settings["lr"]


@each_kind
def test_subclass_of_ours_steps_once_and_keeps_its_hooks(case, device):
    """Users wrap `step`; patching the class a second time would call the hooks twice in a plain step."""
    steps = []

    class Counting(case.ours):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = Counting(params, **case.settings, backend="eager"), peer(case, theirs)
    train(case, range(2), (params, opt), (theirs, torchs))
    assert len(steps) == 2
    assert_same(case, opt, torchs)


# Copies


def pickled(params, opt):
    return pickle.loads(pickle.dumps((params, opt)))


def deepcopied(params, opt):
    return copy.deepcopy((params, opt))


@each_kind_and_backend
@pytest.mark.parametrize("duplicate", [pickled, deepcopied])
def test_copy_in_mid_training_goes_on_alike_and_apart(case, backend, duplicate, device):
    params = case.parameters(device)
    opt = ours(case, params, backend)
    train(case, range(2), (params, opt))
    twins, twin = duplicate(params, opt)
    assert type(twin) is type(opt)
    assert twin.backend == backend
    assert all(p is q for p, q in zip(twins, twin.param_groups[0]["params"], strict=True))
    before = values(params)
    train(case, range(2, 4), (twins, twin))
    assert_equal(params, before)  # the original is not touched
    train(case, range(2, 4), (params, opt))
    assert_same(case, twin, opt, rtol=0, atol=0)


@each_kind
def test_optimizer_saved_whole_by_torch_goes_on_alike(case, device):
    params = case.parameters(device)
    opt = ours(case, params)
    train(case, range(2), (params, opt))
    file = io.BytesIO()
    torch.save((params, opt), file)
    file.seek(0)
    twins, twin = torch.load(file, weights_only=False)
    train(case, range(2, 4), (params, opt), (twins, twin))
    assert_same(case, twin, opt, rtol=0, atol=0)


@each_kind_and_backend
def test_pickle_is_no_larger_than_torchs(case, backend, device):
    """Plans, tables and work buffers belong to the process. No state may bring others along."""
    shapes = ((32, 32),) * 6
    params, theirs = case.parameters(device, shapes=shapes), case.parameters(device, shapes=shapes)
    opt, torchs = ours(case, params, backend), peer(case, theirs)
    train(case, range(2), (params, opt), (theirs, torchs))
    for content in (lambda o: o, lambda o: o.state_dict()):
        assert len(pickle.dumps(content(opt))) < len(pickle.dumps(content(torchs))) + 4096
        files = io.BytesIO(), io.BytesIO()
        torch.save(content(opt), files[0])
        torch.save(content(torchs), files[1])
        assert files[0].tell() < files[1].tell() + 4096


@each_kind_and_backend
def test_state_dict_through_a_file_with_weights_only(case, backend, device):
    params = case.parameters(device)
    opt = ours(case, params, backend)
    train(case, range(2), (params, opt))
    file = io.BytesIO()
    torch.save({"model": params, "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = saved["model"]
    other = ours(case, resumed, backend, lr=123.0)
    other.load_state_dict(saved["optimizer"])
    train(case, range(2, 4), (params, opt), (resumed, other))
    assert_same(case, other, opt, rtol=0, atol=0)
