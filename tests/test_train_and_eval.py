"""train() and eval() of an optimizer with ema_decay: the averages stand in for the weights, checkpoints included."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from compared import assert_same_bits, values
from complaints import explains
from sharding import RANKS, playing, sharded
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import Shard
from torch.nn import Parameter

import triton_optim as to

BF16 = torch.bfloat16
PRECISIONS = ["storage", "stochastic", "kahan", "split24", "split32", "master"]


def net(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).to(dtype)


def made(model: torch.nn.Module, **options: Any) -> Any:
    return to.AdamW(model.parameters(), **({"lr": 0.05, "ema_decay": 0.8, "backend": "eager"} | options))


def train(model: torch.nn.Module, opt: Any, steps: Any, evaluates: bool = False) -> None:
    for step in steps:
        opt.train()
        opt.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(x).square().sum().backward()
        opt.step()
        if evaluates:
            opt.eval()


def trained(steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Any]:
    model = net(dtype)
    opt = made(model, **options)
    train(model, opt, range(steps))
    return model, opt


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_parameters_are_the_averages_and_come_back_bit_for_bit(precision: str) -> None:
    model, opt = trained(dtype=BF16, param_precision=precision, state_dtype=torch.float32)
    weights, states = values(model), copy.deepcopy([dict(opt.state[p]) for p in model.parameters()])
    assert opt.training
    opt.eval()
    assert not opt.training
    for p, before in zip(model.parameters(), weights, strict=True):
        assert_same_bits(p.detach(), opt.state[p]["ema"].to(BF16))
        assert not torch.equal(p, before)
    opt.eval()
    opt.train()
    opt.train()
    assert opt.training
    assert_same_bits((values(model), [dict(opt.state[p]) for p in model.parameters()]), (weights, states))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_training_that_is_evaluated_ends_where_one_ends_that_is_not(dtype: torch.dtype, backend: str) -> None:
    ends = []
    for evaluates in (False, True):
        model = net(dtype)
        opt = made(model, backend=backend, ema_dtype=BF16, param_precision="stochastic")
        train(model, opt, range(5), evaluates)
        opt.train()
        ends.append((values(model), opt.state_dict()["state"]))
    assert_same_bits(*ends)


def saved_and_loaded(model: torch.nn.Module, opt: Any, dtype: torch.dtype, options: Any) -> tuple[Any, Any]:
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    again = net(dtype)
    other = made(again, **options)
    again.load_state_dict(weights)
    other.load_state_dict(states)
    return again, other


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "int8", "ema_dtype": BF16}),
        (BF16, {"param_precision": "split32", "ema_warmup": True}),
    ],
    ids=["plain", "int8", "split32"],
)
@pytest.mark.parametrize("way", ["state dict", "deepcopy", "pickle"])
def test_a_checkpoint_in_evaluation_mode_goes_on_from_the_weights(way: str, dtype: torch.dtype, options: Any) -> None:
    model, opt = trained(3, dtype, **options)
    opt.eval()
    if way == "state dict":
        again, other = saved_and_loaded(model, opt, dtype, options)
    else:
        copied = copy.deepcopy if way == "deepcopy" else lambda both: pickle.loads(pickle.dumps(both))
        again, other = copied((model, opt))
    assert_same_bits(values(again), values(model))  # the averages: what is evaluated is what was saved
    assert not other.training
    for each, own in ((model, opt), (again, other)):
        train(each, own, range(3, 6))
        own.eval()
    assert_same_bits(values(again), values(model))
    opt.train()
    other.train()
    assert_same_bits((values(again), other.state_dict()["state"]), (values(model), opt.state_dict()["state"]))
    straight, _ = trained(6, dtype, **options)
    assert_same_bits(values(again), values(straight))


def test_what_is_loaded_says_where_the_parameters_are() -> None:
    model, opt = trained()
    weights, before = values(model), copy.deepcopy((model.state_dict(), opt.state_dict()))
    opt.eval()
    model.load_state_dict(before[0])
    opt.load_state_dict(before[1])
    assert opt.training
    opt.train()
    assert_same_bits(values(model), weights)


def test_a_step_in_evaluation_mode() -> None:
    model, opt = trained()
    opt.eval()
    inside = values(model)
    for release in (False, True):
        if release:
            to.enable_gradient_release(opt)
        step = (lambda: model(torch.ones(1, 5)).sum().backward()) if release else opt.step
        with pytest.raises(RuntimeError, match="step in evaluation mode") as error:
            step()
        explains(error, "AdamW", "averages", "optimizer.train()")
        assert_same_bits(values(model), inside)
    opt.train()
    train(model, opt, [3])


def test_within_averaged_parameters_nothing_is_swapped_again() -> None:
    """As where a Trainer's evaluation is called within it."""
    model, opt = trained()
    weights = values(model)
    with opt.averaged_parameters():
        averages = values(model)
        opt.eval()
        opt.train()
        assert_same_bits(values(model), averages)
    assert_same_bits(values(model), weights)
    opt.eval()
    with opt.averaged_parameters():
        assert_same_bits(values(model), averages)
        opt.state_dict()
    assert_same_bits(values(model), averages)
    opt.train()
    assert_same_bits(values(model), weights)


@pytest.mark.parametrize("options", [{"ema_decay": None}, {}], ids=["no averages", "no step"])
def test_where_there_is_nothing_to_swap(options: Any) -> None:
    model = net()
    opt = made(model, **options)
    if options:
        train(model, opt, [0])
    weights = values(model)
    opt.eval()
    assert opt.training
    assert_same_bits(values(model), weights)
    train(model, opt, [1], evaluates=True)


def test_only_groups_with_averages_are_swapped_and_a_parameter_once() -> None:
    model = net()
    first, second = model[0], model[2]
    groups = [{"params": [*first.parameters()], "ema_decay": 0.5}, {"params": [*second.parameters()]}]
    opt = to.SGD(groups, lr=0.1, backend="eager")
    opt.param_groups[0]["params"].append(first.weight)
    train(model, opt, range(3))
    weights = values(model)
    opt.eval()
    assert [torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True)] == [False, False, True, True]
    opt.train()
    assert_same_bits(values(model), weights)


def test_what_leads_out_of_evaluation_mode() -> None:
    model, opt = trained()
    expected = to.to_torch_state_dict(opt)
    opt.eval()
    assert_same_bits(to.to_torch_state_dict(opt)["state"], expected["state"])
    for way in (to.master_state_dict, lambda m, o: to.load_master_state_dict(m, o, m.state_dict())):
        with pytest.raises(RuntimeError, match=r"master_state_dict\(\) in evaluation mode") as error:
            way(model, opt)
        explains(error, "averages", "optimizer.train()")


@pytest.mark.parametrize("fault", ["shape", "dtype", "kind", "no average"])
def test_weights_that_are_not_the_parameters(fault: str) -> None:
    _, opt = trained()
    opt.eval()
    saved = opt.state_dict()
    own = saved["state"][0]["ema"]
    if fault == "no average":
        saved["state"][0] |= {"weights": own["weights"]}
        del saved["state"][0]["ema"], saved["state"][0]["n_averaged"]
    else:
        own["weights"] = {"shape": own["weights"][:2], "dtype": own["weights"].half(), "kind": 3.0}[fault]
    before = opt.state_dict()
    with pytest.raises((RuntimeError, ValueError)) as error:
        opt.load_state_dict(saved)
    explains(error, "weights" if fault != "no average" else "ema", "parameter 0")
    assert_same_bits(opt.state_dict()["state"], before["state"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_says_that_it_lacks_the_average(tmp_path: Any) -> None:
    """It loads what a new optimizer has, which has no weights besides: going on from averages would be wrong."""
    model, opt = trained()
    opt.eval()
    weights, states = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)
    again, other = trained(1)
    weights, states = get_state_dict(again, other)
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key in checkpoint state_dict: .*\.ema"):
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)


def test_sharded_parameters(device: torch.device) -> None:
    full = torch.randn(5, 6, device=device)
    with playing(1, device) as mesh:
        p = Parameter(sharded(full, mesh, [Shard(0)]))
        opt = to.SGD([p], lr=0.1, ema_decay=0.5, backend="eager")
        for _ in range(3):
            p.grad = sharded(torch.ones(5, 6, device=device), mesh, [Shard(0)])
            opt.step()
        weights, average = p.to_local().clone(), opt.state[p]["ema"].to_local().clone()
        opt.eval()
        assert torch.equal(p.to_local(), average)
        assert opt.state[p]["weights"].placements == p.placements
        with pytest.raises(RuntimeError, match=r"state_dict.. in evaluation mode, with sharded") as error:
            opt.state_dict()
        explains(error, "SGD", "optimizer.train()")
        opt.train()
        assert torch.equal(p.to_local(), weights)
        assert RANKS > 1
        opt.state_dict()


AWAY = {"average": (to.AdamW, {"ema_decay": 0.5}), "two places": (to.ScheduleFreeAdamW, {})}


@pytest.mark.parametrize("kind", AWAY)
def test_a_parameter_of_another_shape_moves_no_other(kind: str) -> None:
    """Such as an embedding that was made larger: neither way does half of the parameters move."""
    cls, options = AWAY[kind]
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(4))]
    opt = cls(params, lr=0.1, backend="eager", **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    old = params[1].data
    for move in (opt.eval, opt.train):
        training, before = opt.training, params[0].clone()
        params[1].data = torch.ones(5)
        with pytest.raises(RuntimeError, match=r"parameter 1 has shape \(4,\); the parameter \(5,\)"):
            move()
        assert opt.training == training
        assert torch.equal(params[0], before)
        params[1].data = old
        move()
        assert opt.training != training
        assert not torch.equal(params[0], before)


@pytest.mark.parametrize("gone", [True, False])
def test_a_parameter_whose_average_was_deleted_stays(gone: bool) -> None:
    p = Parameter(torch.ones(3))
    opt = to.AdamW([p], ema_decay=0.5, backend="eager")
    p.grad = torch.ones(3)
    opt.step()
    opt.state[p]["ema"] = None
    if gone:
        del opt.state[p]["ema"]
    before = p.clone()
    opt.eval()
    assert torch.equal(p, before)
    with opt.averaged_parameters():
        assert torch.equal(p, before)
