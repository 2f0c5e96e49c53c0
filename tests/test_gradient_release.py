"""Gradient release: parameters that are updated in backward end as ordinary training ends, without the gradients."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from compared import assert_same_bits, bits
from releasing import Model, backward, batch, model, pair, train
from torch import Tensor
from torch.nn import Parameter
from two_tensor import parameter, value_of

import triton_optim as to
from triton_optim.engine import plan
from triton_optim.engine.plan import Plan

BF16 = torch.bfloat16
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (to.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "momentum": (to.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Lion": (to.Lion, {"lr": 0.01}),
    "Adafactor": (to.Adafactor, {"lr": 0.01}),
}


# As ordinary training


@pytest.mark.parametrize("rule", list(RULES))
def test_released_training_is_ordinary_training_bit_for_bit(rule, backend, device):
    """With a scheduler, a parameter that is used twice, one that misses gradients, one that never has any."""
    cls, options = RULES[rule]
    pairs = pair(device, cls, backend=backend, **options)
    to.enable_gradient_release(pairs[1][1])
    train(pairs, range(6), [torch.optim.lr_scheduler.StepLR(opt, 2, 0.5) for _, opt in pairs])
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))
    assert pairs[0][1].state[pairs[0][0].first.weight]


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"ema_decay": 0.9, "ema_warmup": True, "ema_dtype": BF16}])
def test_averages_are_counted_as_in_ordinary_training(options, backend, device):
    """Once a step: of whoever has no gradient in it too, and of who comes late from then on."""
    pairs = pair(device, backend=backend, **options)
    to.enable_gradient_release(pairs[1][1])
    for step in (1, 4, 0, 1, 2):  # the third layer comes in the third step, and misses the fourth
        train(pairs, [step])
        assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))
    for _, opt in pairs:  # a step without a backward
        opt.step()
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))


def test_random_bits_are_those_of_ordinary_training(backend, device):
    options = {"param_precision": "stochastic", "state_dtype": BF16, "lr": 0.01, "backend": backend}
    pairs = pair(device, to.AdamW, BF16, **options)
    to.enable_gradient_release(pairs[1][1])
    train(pairs, range(4))
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))


def test_codes_are_those_of_ordinary_training(backend, device):
    ends = []
    for release in (False, True):
        p, q = Parameter(torch.ones(70, 64, device=device)), Parameter(torch.ones(3, device=device))
        opt = to.AdamW([p, q], lr=0.01, state_dtype="int8", backend=backend)
        if release:
            to.enable_gradient_release(opt)
        random = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).to(device)
        for step in range(2):
            ((p * random).sum() * (step + 1) + q.square().sum()).backward()
            opt.step()
            opt.zero_grad()
        ends.append(bits(opt))
    assert_same_bits(*ends)


def test_every_group_keeps_its_hyperparameters(device):
    pairs = []
    for _ in range(2):
        own = model(device)
        biases = [p for p in own.parameters() if p.dim() == 1]
        rest = [p for p in own.parameters() if p.dim() == 2]
        groups = [{"params": biases, "weight_decay": 0.0}, {"params": rest, "lr": 0.02, "maximize": True}]
        pairs.append((own, to.AdamW(groups, lr=0.01, weight_decay=0.3, backend="eager")))
    to.enable_gradient_release(pairs[1][1])
    train(pairs, range(2))
    for _, opt in pairs:
        opt.param_groups[1]["lr"] = 0.5
    train(pairs, range(2, 4))
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))


def test_frozen_parameters_stay(device):
    pairs = pair(device)
    for own, _ in pairs:
        own.first.bias.requires_grad_(False)
    before = pairs[1][0].first.bias.clone()
    to.enable_gradient_release(pairs[1][1])
    train(pairs, range(3))
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))
    assert torch.equal(pairs[1][0].first.bias, before)


def test_gradients_that_accumulate_are_released_with_the_last(backend, device):
    pairs = pair(device, momentum=0.9, backend=backend)
    handle = to.enable_gradient_release(pairs[1][1])
    for step in range(3):
        for own, opt in pairs:
            if opt is pairs[1][1]:
                with handle.accumulating():
                    backward(own, 10 * step)
                    backward(own, 10 * step + 2)
                assert own.first.weight.grad is not None
            else:
                backward(own, 10 * step)
                backward(own, 10 * step + 2)
            backward(own, 10 * step + 1)  # not through the third layer, whose gradient is there already
            opt.step()
            opt.zero_grad()
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))
    assert all(p.grad is None for p in pairs[1][0].parameters())


def test_gradients_that_only_accumulated_are_stepped_by_step(device):
    pairs = pair(device, ema_decay=0.9)
    handle = to.enable_gradient_release(pairs[1][1])
    for step in range(3):
        with handle.accumulating():
            backward(pairs[1][0], step)
        backward(pairs[0][0], step)
        for _, opt in pairs:
            opt.step()
            opt.zero_grad()
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))


def test_a_closure_may_run_the_backward(device):
    pairs = pair(device)
    to.enable_gradient_release(pairs[1][1])
    losses = []
    for own, opt in pairs:

        def closure(own: Model = own) -> Tensor:
            loss = own(batch(0, own))
            loss.backward()
            return loss

        losses.append(opt.step(closure))
    assert torch.equal(*losses)
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))


def test_parameters_without_memory_of_their_own_share_none(device):
    params = [parameter(torch.ones(3, device=device)) for _ in range(2)]
    opt = to.SGD(params, lr=0.5, backend="eager")
    to.enable_gradient_release(opt)
    sum(p.sum() for p in params).backward()
    opt.step()
    assert all(p.grad is None for p in params)
    assert [value_of(p).tolist() for p in params] == [[0.5] * 3] * 2


# State dicts, and the end


def test_a_state_dict_is_saved_and_loaded_in_mid_training(backend, device):
    pairs = pair(device, momentum=0.9, ema_decay=0.9, backend=backend)
    to.enable_gradient_release(pairs[1][1])
    train(pairs, range(3))
    states = [(copy.deepcopy(own.state_dict()), copy.deepcopy(opt.state_dict())) for own, opt in pairs]
    assert_same_bits(states[1], states[0])
    train(pairs, range(3, 5))
    for (own, opt), (weights, state) in zip(pairs, states, strict=True):
        own.load_state_dict(weights)
        opt.load_state_dict(state)
    train(pairs, range(5, 8))
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))


def test_it_may_begin_and_end_in_mid_training(device):
    pairs = pair(device, to.AdamW, ema_decay=0.9)
    train(pairs, range(2))
    handle = to.enable_gradient_release(pairs[1][1])
    train(pairs, range(2, 4))
    handle.remove()
    handle.remove()
    assert not pairs[1][1]._step_supports_amp_scaling
    backward(pairs[1][0], 0)
    assert pairs[1][0].first.weight.grad is not None
    pairs[1][1].zero_grad()
    train(pairs, range(4, 6))
    handle = to.enable_gradient_release(pairs[1][1])
    train(pairs, range(6, 8))
    assert_same_bits(bits(pairs[1][1]), bits(pairs[0][1]))
    handle.remove()
    to.clip_grad_norm_(pairs[1][0].parameters(), 1.0)


def test_a_copy_of_the_optimizer_releases_nothing(device):
    pairs = pair(device)
    to.enable_gradient_release(pairs[1][1])
    _, opt = copy.deepcopy(pairs[1])
    assert opt.engine.release is None
    assert not opt._step_supports_amp_scaling


# What it is for


def test_no_more_than_a_few_gradients_are_alive_at_a_time(device):
    layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8, bias=False) for _ in range(30)]).to(device)
    opt = to.SGD(layers.parameters(), lr=0.1, backend="eager")
    most, gradients = 0, weakref.WeakSet()

    def look(p: Tensor) -> None:
        nonlocal most
        gradients.add(p.grad)
        most = max(most, len(gradients))

    for p in layers.parameters():
        p.register_post_accumulate_grad_hook(look)
    to.enable_gradient_release(opt)
    for _ in range(2):
        gc.collect()
        layers(torch.ones(1, 8, device=device)).sum().backward()
        opt.step()
    assert 0 < most <= 3
    assert len(gradients) <= 2


@pytest.mark.parametrize("count", [10, 80])
def test_work_a_parameter_does_not_grow_with_their_number(count, monkeypatch, device):
    """After the first step no plan is made anew. In it, too, no parameter is looked at for each of the others."""
    calls = dict.fromkeys(("plans", "addresses", "looks"), 0)

    def count_calls(owner: Any, name: str, what: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[what] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    params = [Parameter(torch.ones(3, device=device)) for _ in range(count)]
    opt = to.AdamW(params, lr=0.1, backend="eager")
    to.enable_gradient_release(opt)
    count_calls(Plan, "__init__", "plans")
    count_calls(Tensor, "data_ptr", "addresses")
    count_calls(plan, "is_sharded", "looks")
    for step in range(3):
        calls.update(dict.fromkeys(calls, 0))
        sum(p.square().sum() for p in params).backward()
        opt.step()
        assert calls["plans"] == (count if step == 0 else 0)
        assert calls["addresses"] <= (8 if step else 16) * count
        assert calls["looks"] <= 4 * count
