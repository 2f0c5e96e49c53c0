"""What users edit while gradients are released, what needs all gradients at once, and steps that fail."""

import math
from typing import Any

import edits
import pytest
import torch
from compared import assert_same_bits, bits
from complaints import explains
from edits import GROUPS, STATES, TWICE, assert_as_torch, trained
from releasing import Model, backward, batch, model, pair, train
from torch.nn import Parameter

import triton_optim as to

# Edits between two steps


def releasing(opt: Any) -> Any:
    to.enable_gradient_release(opt)
    return opt.step


@pytest.mark.parametrize("edit", [*GROUPS, *STATES], ids=lambda edit: edit.__name__)
def test_the_next_backward_sees_an_edit(edit, backend, device):
    if backend in ("compiled", "triton") and edit not in (edits.swap, edits.clear_all_states):
        pytest.skip("the others are tried on the faster backends")
    ours = trained(to.AdamW, edit, device, releasing, backend=backend)
    assert_as_torch(ours, trained(torch.optim.AdamW, edit, device, foreach=False))
    if edit in STATES:  # of a parameter that is gone torch's has a KeyError
        assert ours[1].state_dict()["state"].keys() == set(range(5))


@pytest.mark.parametrize("edit", [edits.replace, *STATES], ids=lambda edit: edit.__name__)
def test_averages_of_an_edited_state(edit, device):
    """With warmup, so that of how many values they are tells."""
    options = {"ema_decay": 0.9, "ema_warmup": True, "backend": "eager"}
    released, plain = (trained(to.AdamW, edit, device, step, **options) for step in (releasing, lambda opt: opt.step))
    assert_as_torch(released, plain)


@pytest.mark.parametrize("edit", TWICE, ids=lambda edit: edit.__name__)
def test_a_parameter_that_comes_to_be_listed_twice(edit, device):
    with pytest.raises(RuntimeError, match="listed twice") as error:
        trained(to.AdamW, edit, device, releasing, backend="eager")
    explains(error, "AdamW", "Give each once", "remove()")


def test_a_parameter_that_is_taken_out_is_its_owners_again(device):
    own, opt, _ = released(device)
    weight = own.third.weight
    opt.param_groups[0]["params"] = [p for p in own.parameters() if p is not weight]
    backward(own, 0)
    opt.step()
    before = weight.detach().clone()
    backward(own, 3)
    assert weight.grad is not None
    assert own.first.weight.grad is None
    assert torch.equal(weight, before)
    to.clip_grad_norm_(weight, 1.0)
    to.enable_gradient_release(to.SGD([weight], lr=0.1, backend="eager"))


def test_a_parameter_that_was_frozen_is_released_from_its_second_gradient_on(device):
    pairs = pair(device, momentum=0.9)
    for own, _ in pairs:
        own.first.bias.requires_grad_(False)
    to.enable_gradient_release(pairs[1][1])
    train(pairs, [0])
    for own, opt in pairs:
        own.first.bias.requires_grad_(True)
        backward(own, 0)
        opt.step()
        opt.zero_grad()
    train(pairs, [2])
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))


def test_a_norm_that_is_limited_later(device):
    """Without an error, the weight would move by 100, not by 1."""
    p = Parameter(torch.zeros(1, device=device))
    opt = to.SGD([p], lr=1.0, backend="eager")
    handle = to.enable_gradient_release(opt)
    with pytest.raises(RuntimeError, match="max_grad_norm") as error:
        opt.max_grad_norm = 1.0
    explains(error, "SGD", "1.0", "remove()")
    assert opt.max_grad_norm is None
    opt.max_grad_norm = None
    handle.remove()
    opt.max_grad_norm = 1.0
    (100 * p).sum().backward()
    opt.step()
    assert p.item() == pytest.approx(-1)


def test_amp_that_is_set_later(device):
    own, opt, _ = released(device)
    before = bits(opt)
    opt.amp = "fused"
    for run in (lambda: backward(own, 0), opt.step):
        with pytest.raises(RuntimeError, match="amp") as error:
            run()
        explains(error, "SGD", '"fused"', "remove()")
    assert_same_bits(bits(opt), before)


def test_a_group_that_shares_memory_is_not_added(device):
    own, opt, handle = released(device)
    with pytest.raises(RuntimeError, match="share memory") as error:
        opt.add_param_group({"params": [Parameter(own.never.weight.detach()[:1])]})
    explains(error, "SGD", "Give each once")
    assert len(opt.param_groups) == 1
    backward(own, 0)
    opt.step()
    handle.remove()
    assert not any(p._post_accumulate_grad_hooks for p in own.parameters())


# Errors


def released(device: Any, **options: Any) -> tuple[Model, Any, Any]:
    own = model(device)
    opt = to.SGD(own.parameters(), lr=0.1, backend="eager", **options)
    return own, opt, to.enable_gradient_release(opt)


@pytest.mark.parametrize(("options", "named"), [({"max_grad_norm": 2.5}, "2.5"), ({"amp": "fused"}, '"fused"')])
def test_what_needs_all_gradients_at_once(options, named, device):
    opt = to.AdamW(model(device).parameters(), **options)
    with pytest.raises(RuntimeError, match=next(iter(options))) as error:
        to.enable_gradient_release(opt)
    explains(error, "AdamW", named, "Leave one of them out")
    assert opt.engine.release is None


def test_twice(device):
    own, opt, handle = released(device)
    with pytest.raises(RuntimeError, match="enabled already") as error:
        to.enable_gradient_release(opt)
    explains(error, "SGD", "remove()")
    other = to.AdamW(own.parameters())
    with pytest.raises(RuntimeError, match="parameter 0") as error:
        to.enable_gradient_release(other)
    explains(error, "remove()")
    assert opt.engine.release is handle


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameters_without_a_gradient_of_their_own(device):
    p, base = Parameter(torch.ones(4, device=device)), torch.ones(6, device=device)
    for params in ([p, p], [Parameter(base[:4]), Parameter(base[2:])]):
        with pytest.raises(RuntimeError, match="share memory, or are listed twice") as error:
            to.enable_gradient_release(to.SGD(params, lr=0.1))
        explains(error, "SGD", "Give each once")
    p.square().sum().backward()
    assert p.grad is not None


def test_two_backwards_without_a_step(device):
    own, opt, _ = released(device)
    backward(own, 0)
    before = bits(opt)
    with pytest.raises(RuntimeError, match="arrived twice") as error:
        backward(own, 2)
    explains(error, "parameter", "optimizer.step()", "handle.accumulating()")
    assert_same_bits(bits(opt), before)
    opt.zero_grad()
    opt.step()
    backward(own, 2)


@pytest.mark.parametrize("clip", [to.clip_grad_norm_, to.clip_grad_value_])
def test_clipping_of_what_was_released(clip, device):
    own, _, handle = released(device)
    backward(own, 0)
    for given in (own.parameters(), list(own.parameters()), own.first.weight):
        with pytest.raises(RuntimeError, match="released in backward") as error:
            clip(given, 1.0)
        explains(error, "parameter 0", "remove()")
    handle.remove()
    clip(own.parameters(), 1.0)


@pytest.mark.parametrize("scaler_class", [torch.amp.GradScaler, to.GradScaler])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_that_steps_what_was_released(scaler_class, unscale, device):
    own, opt, _ = released(device)
    scaler = scaler_class(device.type, init_scale=2.0)
    scaler.scale(own(batch(0, own))).backward()
    before = bits(opt)
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="scaler") as error:
        scaler.step(opt)
    explains(error, "SGD", "bfloat16", "remove()")
    assert_same_bits(bits(opt), before)
    opt.step()  # the scaler is forgotten
    off = scaler_class(device.type, enabled=False)
    backward(own, 0)
    off.step(opt)


def test_a_backward_within_averaged_parameters(device):
    """Else the update would be lost with the averages."""
    own, opt, _ = released(device, ema_decay=0.5)
    backward(own, 0)
    opt.step()
    before = bits(opt)
    with opt.averaged_parameters():
        with pytest.raises(RuntimeError, match=r"averaged_parameters\(\)") as error:
            backward(own, 2)
        opt.zero_grad()
    explains(error, "Leave it first")
    assert_same_bits(bits(opt), before)
    backward(own, 2)


def test_an_update_that_fails_may_be_tried_again(device):
    """As where a gradient is sparse: the parameter keeps it, and nothing is counted."""
    embedding = torch.nn.Embedding(4, 3, sparse=True).to(device)
    opt = to.AdamW(embedding.parameters(), lr=0.1)
    to.enable_gradient_release(opt)
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        embedding(torch.tensor([1], device=device)).sum().backward()
    assert torch.equal(embedding.weight, before)
    embedding.weight.grad = None
    embedding.sparse = False
    embedding(torch.tensor([1], device=device)).sum().backward()
    assert not torch.equal(embedding.weight, before)
    assert math.isclose(opt.state[embedding.weight]["step"], 1)


def test_a_group_that_is_added_later_is_released_too():
    first, second = (Parameter(torch.ones(3)) for _ in range(2))
    opt = to.SGD([first], lr=0.5, backend="eager")
    handle = to.enable_gradient_release(opt)
    opt.add_param_group({"params": [second], "lr": 0.25})
    (first.sum() + second.sum()).backward()
    assert first.grad is None
    assert second.grad is None
    opt.step()
    assert [p[0].item() for p in (first, second)] == [0.5, 0.75]
    handle.remove()
    second.sum().backward()
    assert second.grad is not None
