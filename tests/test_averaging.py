"""The exponential moving average of the weights: torch's AveragedModel, in the step; swapped in, saved and loaded."""

import copy
import io
from typing import Any

import pytest
import torch
from averaging import ALWAYS, BF16, EMPTY, LATE, SHAPES, SOMETIMES, averaged, bits, give, model, small, train
from compared import assert_same_bits
from complaints import explains
from conftest import BACKENDS
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import triton_optim as to

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (to.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "SGD": (to.SGD, {"lr": 0.1}),
    "momentum": (to.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": (to.Adagrad, {"lr": 0.1}),
    "ASGD": (to.ASGD, {"lr": 0.1, "t0": 5}),
    "NAdam": (to.NAdam, {"lr": 0.01}),
    "Lion": (to.Lion, {"lr": 0.01}),
    "Adafactor": (to.Adafactor, {"lr": 0.1}),
    "Muon": (to.Muon, {"lr": 0.1}),
}


# The values


def check_against_torch(rule: str, backend: str, device: Any) -> None:
    cls, options = RULES[rule]
    params = model(device)
    opt = cls(params, **options, ema_decay=0.8, backend=backend)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 4, 0.7)
    theirs = AveragedModel(params, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for step in range(20):
        give(params, step)
        opt.step()
        schedule.step()
        theirs.update_parameters(params)
        if step in (0, 4, 5, 19):
            torch.testing.assert_close(averaged(opt), [p.detach() for p in theirs.module])
    assert {float(opt.state[params[i]]["n_averaged"]) for i in (ALWAYS, LATE, SOMETIMES, EMPTY)} == {20.0}


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_the_average_is_torchs_on_every_backend(rule, backend, device):
    """With parameters that come late, miss gradients, are empty or frozen."""
    check_against_torch(rule, backend, device)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("AdamW", "SGD")])
def test_the_average_of_every_kind_of_rule_is_torchs(rule, device):
    check_against_torch(rule, "eager", device)


@pytest.mark.parametrize("cls", [to.SparseAdam, to.SGD, to.Adagrad])
def test_rows_without_a_gradient_are_averaged_too(cls, device):
    """A sparse gradient moves some rows only, and the average of the others still goes to them."""
    embedding = torch.nn.Embedding(6, 3, sparse=True).to(device)
    opt = cls(embedding.parameters(), lr=0.1, ema_decay=0.5)
    theirs = AveragedModel(embedding, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for rows in ([0, 1], [1, 2], [2, 3], [0, 0], [5]):
        opt.zero_grad()
        embedding(torch.tensor(rows, device=device)).square().sum().backward()
        opt.step()
        theirs.update_parameters(embedding)
    torch.testing.assert_close(averaged(opt), [theirs.module.weight.detach()])


@pytest.mark.parametrize("decay", [0.99, 0.0])
def test_warmup_lets_the_decay_rise(decay, backend, device):
    """min(ema_decay, (1 + n) / (10 + n)) after n steps."""
    params, expected = model(device, shapes=[(5, 3)]), torch.zeros(())
    opt = to.SGD(params, lr=0.1, ema_decay=decay, ema_warmup=True, backend=backend)
    for n in range(12):
        train(params, opt, [n])
        now = params[0].detach().double()
        own = min(decay, (1 + n) / (10 + n)) if n else 0.0
        expected = own * expected + (1 - own) * now
        torch.testing.assert_close(averaged(opt)[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.values != ("compiled",)])
def test_the_average_keeps_no_rounding_of_a_large_start(backend, device):
    """1e8 is rounded to a multiple of 8, which an average that is a thousandth of it must not be."""
    p = Parameter(torch.full((5,), 1e8, device=device))
    opt = to.SGD([p], lr=0.0, ema_decay=2.0**-10, backend=backend)
    for value in (1e8, 1.0):
        p.data.fill_(value)
        p.grad = torch.ones_like(p)
        opt.step()
    exact = torch.full((5,), 1 + (1e8 - 1) * 2.0**-10, device=device)
    torch.testing.assert_close(opt.state[p]["ema"], exact, rtol=1e-6, atol=0)


def test_the_average_of_a_double_is_a_double(backend, device):
    params = model(device, torch.float64, [(5, 3)])
    opt = to.SGD(params, lr=0.1, ema_decay=0.9, backend=backend)
    expected = None
    for step in range(5):
        train(params, opt, [step])
        now = params[0].detach()
        expected = now.clone() if expected is None else 0.9 * expected + 0.1 * now
    assert opt.state[params[0]]["ema"].dtype == torch.float64
    torch.testing.assert_close(averaged(opt)[0], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("missing", [False, True], ids=["stepping", "without gradients"])
def test_an_average_in_bfloat16_is_right_on_average(missing, backend, device):
    """It moves by an eighth of its last place a step, which to the nearest is nothing."""
    found = []
    for dtype in (BF16, torch.float32):
        p, other = (Parameter(torch.ones(n, device=device)) for n in (2048, 1))
        opt = to.SGD([p, other], lr=0.125, ema_decay=0.99, ema_dtype=dtype, backend=backend)
        for step in range(12):
            other.grad = torch.zeros(1, device=device)
            p.grad = torch.full((2048,), float(step == 1), device=device) if step < 2 or not missing else None
            opt.step()
        assert opt.state[p]["ema"].dtype == dtype
        found.append(1 - float(averaged(opt)[0].double().mean()))
    half, exact = found
    assert exact > 0.01
    assert abs(half - exact) < 0.03 * exact


def test_only_a_group_with_a_decay_is_averaged(backend, device):
    params = model(device, shapes=SHAPES[:3])
    groups = [{"params": [params[0]]}, {"params": [params[1]], "ema_decay": 0.5}, {"params": [params[2]]}]
    opt = to.SGD(groups, lr=0.1, backend=backend)
    before = params[1].detach().clone()
    for step in (6, 9):
        train(params, opt, [step])
        before = params[1].detach().clone() if step == 6 else 0.5 * (before + params[1].detach())
    assert ["ema" in opt.state.get(p, {}) for p in params] == [False, True, False]
    own = [p.detach().clone() for p in params]
    torch.testing.assert_close(averaged(opt), [own[0], before, own[2]])


# State dicts


def saved(opt: Any) -> Any:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [None, BF16], ids=str)
def test_training_goes_on_from_a_checkpoint_bit_for_bit(dtype, backend, device):
    params = model(device)
    options = {"lr": 0.1, "ema_decay": 0.9, "ema_dtype": dtype, "ema_warmup": True, "backend": backend}
    opt = to.SGD(params, **options)
    train(params, opt, range(6))
    weights, state = copy.deepcopy(params), saved(opt)
    train(params, opt, range(6, 9))
    loads = to.SGD(weights, **options)
    loads.load_state_dict(state)
    train(weights, loads, range(6, 9))
    assert_same_bits(bits(loads), bits(opt))
    assert_same_bits(averaged(loads), averaged(opt))


def test_averaging_starts_with_what_a_checkpoint_without_averages_left(device):
    params, opt = small(device, ema_decay=None)
    loads = to.AdamW(params, lr=0.01, ema_decay=0.5, backend="eager")
    loads.load_state_dict(saved(opt))
    assert loads.param_groups[0]["ema_decay"] == 0.5
    train(params, loads, [7])
    assert_same_bits(averaged(loads), [p.detach() for p in params])
    before = [p.detach().clone() for p in params]
    train(params, loads, [8])
    torch.testing.assert_close(averaged(loads), [(b + p.detach()) / 2 for b, p in zip(before, params, strict=True)])


def test_a_checkpoint_with_averages_brings_its_decay_along(device):
    """As any hyperparameter of a checkpoint."""
    params, opt = small(device)
    weights = copy.deepcopy(params)
    loads = to.AdamW(weights, lr=0.01, backend="eager")
    loads.load_state_dict(saved(opt))
    train(params, opt, [7])
    train(weights, loads, [7])
    assert_same_bits(bits(loads), bits(opt))
    assert_same_bits(averaged(loads), averaged(opt))


def test_torch_loads_what_is_left_without_averages(device):
    params, opt = small(device)
    state = to.to_torch_state_dict(opt)
    assert all(set(own) == {"step", "exp_avg", "exp_avg_sq"} for own in state["state"].values())
    assert not any(name.startswith("ema") for name in state["param_groups"][0])
    weights, state = copy.deepcopy((params, state))
    theirs = torch.optim.AdamW(weights, lr=0.01)
    theirs.load_state_dict(state)
    train(params, opt, [7])
    train(weights, theirs, [7])
    torch.testing.assert_close(list(weights), list(params))


def test_copies_average_on(device):
    params, opt = small(device)
    weights, other = copy.deepcopy((params, opt))
    train(params, opt, [7])
    train(weights, other, [7])
    assert_same_bits(averaged(other), averaged(opt))


# Options


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_that_is_none(decay):
    with pytest.raises(ValueError, match="ema_decay") as error:
        to.AdamW(model("cpu"), ema_decay=decay)
    explains(error, decay, "below 1")
    opt = to.AdamW([torch.zeros(1)])
    with pytest.raises(ValueError, match="ema_decay"):
        opt.add_param_group({"params": [torch.zeros(2)], "ema_decay": decay})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("dtype", ["int8", torch.float16, torch.float64, "float16"], ids=str)
def test_a_dtype_that_no_average_is_kept_in(dtype):
    with pytest.raises(ValueError, match="ema_dtype") as error:
        to.AdamW(model("cpu"), ema_decay=0.9, ema_dtype=dtype)
    explains(error, repr(dtype), "torch.bfloat16")


def test_an_average_of_a_differentiable_step():
    with pytest.raises(RuntimeError, match="differentiable") as error:
        to.AdamW(model("cpu"), ema_decay=0.9, differentiable=True)
    explains(error, "ema_decay", "Leave")


def test_an_average_joins_those_of_the_groups_alone(device):
    """Of a parameter that is in no group a state dict says nothing: who resumes from one goes on alike."""
    params = [Parameter(torch.ones(3, device=device)) for _ in range(2)]
    opt = to.AdamW([{"params": [p]} for p in params], ema_decay=0.9)
    for k in range(4):
        for p in params:
            p.grad = torch.full_like(p, k + 1.0)
        if k == 3:
            opt.param_groups.pop()
            opt.state[params[0]].clear()
        opt.step()
    assert float(opt.state[params[0]]["n_averaged"]) == 1.0
