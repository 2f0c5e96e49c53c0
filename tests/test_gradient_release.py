"""Gradient release: parameters that are updated in backward end as ordinary training ends, without the gradients."""

import copy
import gc
import math
import weakref
from typing import Any

import edits
import pytest
import torch
from complaints import explains
from edits import GROUPS, STATES, TWICE, assert_as_torch, trained
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


class Model(torch.nn.Module):
    """Two layers that share a parameter, one that is not always used, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.third, self.never = torch.nn.Linear(6, 6), torch.nn.Linear(2, 2)

    def forward(self, x: Tensor, third: bool = True) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        return (self.third(x) if third else x).square().sum()


def model(device: Any, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(device, dtype)


def batch(step: int, own: Model) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1000 + step))
    return x.to(own.never.bias.device, own.never.bias.dtype)


def backward(own: Model, step: int) -> None:
    own(batch(step, own), third=step % 3 != 1).backward()


def bits(opt: Any) -> Any:
    params = [p.detach() for group in opt.param_groups for p in group["params"]]
    return copy.deepcopy((params, opt.state_dict()["state"]))


def assert_same_bits(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def pair(device: Any, cls: Any = to.SGD, dtype: torch.dtype = torch.float32, **options: Any) -> list[tuple[Model, Any]]:
    """A model and its optimizer, twice; the second's gradients are to be released."""
    found = []
    for _ in range(2):
        own = model(device, dtype)
        own_options = {"lr": 0.1, "backend": "eager"} | options
        found.append((own, cls(own.parameters(), **own_options)))
    return found


def train(pairs: list[tuple[Model, Any]], steps: Any, schedules: Any = ()) -> None:
    for step in steps:
        for own, opt in pairs:
            backward(own, step)
            if opt.engine.release is not None:
                assert all(p.grad is None for p in own.parameters())
            opt.step()
            opt.zero_grad()
        for schedule in schedules:
            schedule.step()


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
