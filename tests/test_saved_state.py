"""What is saved says how it is read: quantized states, in other readers, in other classes, after a probe, malformed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from complaints import Unchanged, explains
from conftest import BACKENDS
from table import CASES, Case, rows
from torch import Tensor
from torch.nn import Parameter

import triton_optim as to
from triton_optim.kernels.rules.adam import adam
from triton_optim.spec import State, Variant, averages

BF16 = torch.bfloat16
RULES = [case for case in CASES if case.elementwise and not case.sparse]


def give(params: list[Parameter], step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(p.device, p.dtype)


def train(params: list[Parameter], opt: Any, steps: range) -> None:
    for step in steps:
        give(params, step)
        opt.step()


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> list[Parameter]:
    random = torch.Generator().manual_seed(9)
    return [Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in shapes]


def trained(cls: Any, shape: tuple[int, ...] = (4096,), **options: Any) -> tuple[list[Parameter], Any]:
    params = parameters(shape)
    opt = cls(params, **({"backend": "eager"} | options))
    train(params, opt, range(3))
    return params, opt


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def twin(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def moments(opt: Any) -> dict[str, Tensor]:
    return to.to_torch_state_dict(opt)["state"][0]


# Codes say how they are read.


class Signed(to.RuleOptimizer):
    """Adam, whose second moment has a sign that it needs not."""

    rule = adam
    states = (State("exp_avg"), State("exp_avg_sq"))

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Any:
        return to.Adam.scalars(self, group | {"decoupled_weight_decay": False}, step)


class Nonnegative(Signed):
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))


class WronglyNonnegative(Signed):
    states = (State("exp_avg", nonnegative=True), State("exp_avg_sq", nonnegative=True))


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
@pytest.mark.parametrize("classes", [(Signed, Nonnegative), (Nonnegative, Signed)], ids=["now unsigned", "now signed"])
def test_codes_of_a_class_that_declared_otherwise_are_converted(classes: Any, state_dtype: str) -> None:
    """As when what is declared was changed between saving and loading."""
    params, opt = trained(classes[0], state_dtype=state_dtype)
    other = classes[1](twin(params), state_dtype=state_dtype, backend="eager")
    other.load_state_dict(through_a_file(opt.state_dict()))
    before, after = moments(opt), moments(other)
    assert torch.equal(before["exp_avg"], after["exp_avg"])
    block = {"int8": 0.02, "int4": 0.3}[state_dtype] * before["exp_avg_sq"].max()
    assert float((before["exp_avg_sq"] - after["exp_avg_sq"]).abs().max()) < block
    assert other.state_dict()["state"][0]["exp_avg_sq"]["signed"] == int(classes[1] is Signed)


@pytest.mark.parametrize("how", ["loaded", "unpickled"])
def test_negative_numbers_of_a_state_that_says_it_has_none(how: str) -> None:
    params, opt = trained(Signed, state_dtype="int8")
    other = WronglyNonnegative(twin(params), state_dtype="int8", backend="eager")
    with Unchanged(other), pytest.raises(RuntimeError, match="negative numbers") as error:
        other.load_state_dict(opt.state_dict()) if how == "loaded" else other.__setstate__(opt.__getstate__())
    explains(error, "exp_avg of parameter 0", "WronglyNonnegative")


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_what_is_saved_of_codes(state_dtype: str) -> None:
    _, opt = trained(to.AdamW, (4100,), state_dtype=state_dtype)
    block, bits = {"int8": (256, 8), "int4": (64, 4)}[state_dtype]
    for name, signed in (("exp_avg", 1), ("exp_avg_sq", 0)):
        kept = opt.state_dict()["state"][0][name]
        described = {"bits": bits, "signed": signed, "block": block, "version": 1}
        assert {n: v for n, v in kept.items() if n not in ("codes", "scale")} == described
        assert kept["codes"].numel() * 8 == bits * block * kept["scale"].numel()


MALFORMED_CODES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda kept: kept.update(version=2), "was quantized by version 2"),
    "bits": (lambda kept: kept.update(bits=4), "4 bits in blocks of 256"),
    "other bits": (lambda kept: kept.update(bits=5), "a dict of"),
    "block": (lambda kept: kept.update(block=64), "8 bits in blocks of 64"),
    "codes": (lambda kept: kept.update(codes=kept["codes"][:-1]), "scales"),
    "kind of codes": (lambda kept: kept.update(codes=kept["codes"].float()), "float32"),
    "kind of scale": (lambda kept: kept.update(scale=kept["scale"].to(BF16)), "bfloat16"),
    "part": (lambda kept: kept.pop("signed"), "a dict of"),
    "no tensor": (lambda kept: kept.update(codes=[1, 2]), "a dict of"),
}


@pytest.mark.parametrize("name", MALFORMED_CODES)
def test_codes_that_are_not_what_they_say(name: str) -> None:
    change, says = MALFORMED_CODES[name]
    _, opt = trained(to.AdamW, state_dtype="int8")
    saved = copy.deepcopy(opt.state_dict())
    change(saved["state"][0]["exp_avg_sq"])
    with Unchanged(opt), pytest.raises(RuntimeError, match=says) as error:
        opt.load_state_dict(saved)
    explains(error, "exp_avg_sq of parameter 0")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_copies_keep_codes(copied: Any, state_dtype: str) -> None:
    params, opt = trained(to.AdamW, (4100,), state_dtype=state_dtype)
    twins, other = copied((params, opt))
    torch.testing.assert_close(dict(other.state[twins[0]]), dict(opt.state[params[0]]), rtol=0, atol=0)
    train(params, opt, range(3, 5))
    train(twins, other, range(3, 5))
    assert torch.equal(params[0], twins[0])


def test_codes_that_do_not_say_how_they_are_read() -> None:
    """As they are held, and as they once were saved."""
    params, opt = trained(to.AdamW, state_dtype="int8")
    saved = opt.state_dict()
    saved["state"][0] = dict(opt.state[params[0]])
    with Unchanged(opt), pytest.raises(RuntimeError, match="does not say how") as error:
        opt.load_state_dict(saved)
    explains(error, "exp_avg of parameter 0", "to_torch_state_dict")


# States that are never quantized.


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_a_state_that_is_never_quantized(state_dtype: str, backend: str, device: Any) -> None:
    params, others = parameters((64, 65), device=device), parameters((64, 65), device=device)
    opt = to.ASGD(params, lr=0.1, t0=0, state_dtype=state_dtype, backend=backend)
    theirs = torch.optim.ASGD(others, lr=0.1, t0=0)
    train(params, opt, range(5))
    train(others, theirs, range(5))
    torch.testing.assert_close(opt.state[params[0]]["ax"], theirs.state[others[0]]["ax"], rtol=1e-5, atol=1e-6)
    assert to.memory_report(opt).states["ax"] == 4 * params[0].numel()


def test_frozen_parameters_are_not_in_a_report() -> None:
    frozen, trained_one = Parameter(torch.zeros(100), requires_grad=False), Parameter(torch.zeros(8))
    report = to.memory_report(to.AdamW([frozen, trained_one]))
    assert (report.parameters, report.weights, report.total) == (8, 32, 4 * 32)


def test_an_author_says_what_is_never_quantized() -> None:
    class Kept(Nonnegative):
        states = (State("exp_avg", quantized=False), State("exp_avg_sq", nonnegative=True))

    params, opt = trained(Kept, state_dtype="int8")
    state = opt.state[params[0]]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.float32, torch.int8)
    coded = Nonnegative(twin(params), state_dtype="int8", backend="eager")
    coded.load_state_dict(opt.state_dict())
    give(coded.param_groups[0]["params"], 3)
    coded.step()
    back = Kept(twin(params), state_dtype="int8", backend="eager")
    back.load_state_dict(coded.state_dict())
    train(back.param_groups[0]["params"], back, range(3, 4))
    assert back.state[back.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"states": ("exp_avg", "exp_avg_sq")}, r"states is \('exp_avg', 'exp_avg_sq'\); .* \(State\("),
        ({"states": State("exp_avg")}, "must be a tuple of states"),
        ({"kept_states": [State("row")]}, "kept_states is .* must be a tuple of states"),
        ({"states": (State("exp_avg"), State("master"))}, "master"),
        ({"states": (State("exp_avg"), State("exp_avg_scale"))}, "exp_avg_scale"),
        ({"states": (State("exp_avg"), State("step"))}, "step"),
        ({"states": (State("exp_avg", "gradient"), State("exp_avg_sq"))}, "starts its state exp_avg with 'gradient'"),
        ({"kept_states": (State("exp_avg"),)}, r"declares its states \['exp_avg'\] twice"),
        (
            {"variants": (Variant(adam, (State("m"), State("v"))), Variant(adam, (State("m", 1.0), State("v"))))},
            "two states named m",
        ),
    ],
)
def test_declarations_that_mean_nothing(declared: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        type("Own", (Signed,), declared)


# Other readers.

# Each optimizer of torch's that has states by the names of ours.
READERS = {
    case.name: (case, options)
    for case, options in (
        (next(c for c in RULES if c.name == name), options)
        for name, options in (
            *((name, {}) for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Rprop")),
            ("RMSprop", {"momentum": 0.9}),
            ("SGD", {"momentum": 0.9}),
        )
    )
}


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(8192,), (64, 64), (4100,)], ids=str)
@pytest.mark.parametrize("name", READERS)
def test_torch_does_not_take_codes_for_moments(name: str, shape: tuple[int, ...], state_dtype: str) -> None:
    case, options = READERS[name]
    params, opt = trained(case.ours, shape, lr=1e-2, state_dtype=state_dtype, **options)
    kept = [v for v in opt.state_dict()["state"][0].values() if isinstance(v, dict)]
    assert kept
    for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        if not all(case.peer_takes(option) for option in how):
            continue
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0].update({"foreach": None, "fused": None} | how)
        theirs = case.torchs(twin(params))
        theirs.load_state_dict(saved)
        give(theirs.param_groups[0]["params"], 3)
        with pytest.raises((AttributeError, TypeError, RuntimeError)):
            theirs.step()
    full = case.torchs(twin(params))
    full.load_state_dict(to.to_torch_state_dict(opt))
    train(full.param_groups[0]["params"], full, range(3, 4))


def test_what_torch_loaded_of_codes_and_saved_again_is_refused() -> None:
    params, opt = trained(to.AdamW, state_dtype="int8")
    theirs = torch.optim.AdamW(twin(params))
    theirs.load_state_dict(opt.state_dict())
    with Unchanged(opt), pytest.raises(RuntimeError, match="float32") as error:
        opt.load_state_dict(theirs.state_dict())
    explains(error, "exp_avg of parameter 0")


# A value in place of codes.


# It is quantized by tensor operations, whatever runs the rule after that: graphs of codes take seconds to compile.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values != ("compiled",)])
@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_a_value_put_in_place_of_codes(state_dtype: str, backend: str, device: Any) -> None:
    """It can be saved at once, and is quantized after the next step."""
    params = parameters((4096,), device=device)
    opt = to.AdamW(params, state_dtype=state_dtype, backend=backend)
    train(params, opt, range(2))
    value = torch.randn(4096, generator=torch.Generator().manual_seed(5)).to(device)
    opt.state[params[0]]["exp_avg"] = value.clone()
    saved = copy.deepcopy(opt.state_dict())
    assert torch.equal(saved["state"][0]["exp_avg"], value)
    assert "exp_avg_scale" not in saved["state"][0]
    others = twin(params)
    loads = to.AdamW(others, state_dtype=state_dtype, backend=backend)
    loads.load_state_dict(saved)
    for own, optimizer in ((params, opt), (others, loads)):
        train(own, optimizer, range(2, 3))
        assert optimizer.state[own[0]]["exp_avg"].dtype == torch.int8
    assert torch.equal(params[0], others[0])
    found = moments(opt)["exp_avg"]
    expected = 0.9 * value + 0.1 * params[0].grad
    assert float((found - expected).abs().max()) < {"int8": 0.02, "int4": 0.4}[state_dtype] * float(
        expected.abs().max()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda state: state.update(exp_avg=torch.zeros(4095)),
        lambda state: state.update(exp_avg=state["exp_avg"].to(torch.int32)),
        lambda state: state.update(exp_avg=state["exp_avg"].to(torch.uint8)),
        lambda state: state.update(exp_avg=state["exp_avg"][:-1]),
        lambda state: state.update(exp_avg=torch.zeros(4096, dtype=torch.complex64)),
        lambda state: state.update(exp_avg=0.0),
        lambda state: state.update(exp_avg_scale=state["exp_avg_scale"][:-1]),
        lambda state: state.update(exp_avg_scale=state["exp_avg_scale"].double()),
        lambda state: state.pop("exp_avg_scale"),
    ],
    ids=["shape", "int32", "uint8", "fewer", "complex", "float", "fewer scales", "double scales", "no scales"],
)
def test_what_is_no_state_in_place_of_codes(wrong: Callable[[dict[str, Any]], Any], device: Any) -> None:
    params = parameters((5,), (4096,), device=device)
    opt = to.AdamW(params, state_dtype="int8", backend="eager")
    train(params, opt, range(2))
    wrong(opt.state[params[1]])
    before = [p.detach().clone() for p in params]
    give(params, 2)
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 1") as error:
        opt.step()
    explains(error, "parameter 1")
    assert all(map(torch.equal, params, before))
    assert opt.state[params[0]]["step"] == 2


# A probe of a fresh optimizer.

PROBED: dict[str, dict[str, Any]] = {
    "master": {"param_precision": "master"},
    "kahan int8": {"param_precision": "kahan", "state_dtype": "int8"},
    "split24 int4 average": {"param_precision": "split24", "state_dtype": "int4", "ema_decay": 0.9},
    "split32 average": {"param_precision": "split32", "ema_decay": 0.9, "ema_dtype": BF16},
    "stochastic": {"param_precision": "stochastic", "state_dtype": BF16},
    "master, clipped": {"param_precision": "master", "max_grad_norm": 1.0},
    "master, amp": {"param_precision": "master", "amp": "fused"},
    "master, capturable": {"param_precision": "master", "capturable": True},
}


@pytest.fixture(scope="module")
def dcp() -> Any:
    return pytest.importorskip("torch.distributed.checkpoint.state_dict")


def half_model(device: Any) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 66, device=device, dtype=BF16)


def load_other_weights(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})


def assert_same_optimizers(one: Any, other: Any) -> None:
    states = [opt.state_dict() for opt in (one, other)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    for group, others in zip(one.param_groups, other.param_groups, strict=True):
        torch.testing.assert_close(group["params"], others["params"], rtol=0, atol=0)


def check_probe(dcp: Any, make: Callable[[Any], Any], device: Any, released: bool = False) -> None:
    probed, plain = half_model(device), half_model(device)
    opt, other = make(probed.parameters()), make(plain.parameters())
    if released:
        for optimizer in (opt, other):
            to.enable_gradient_release(optimizer)
    dcp.get_optimizer_state_dict(probed, opt)
    for model in (probed, plain):
        load_other_weights(model)
    weights = [p.detach().clone() for p in probed.parameters()]
    if any(map(averages, opt.param_groups)):
        with opt.averaged_parameters():
            assert all(map(torch.equal, probed.parameters(), weights))
    for model, optimizer in ((probed, opt), (plain, other)):
        for step in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(device, BF16)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert_same_optimizers(opt, other)


@pytest.mark.parametrize("name", PROBED)
def test_a_probe_leaves_nothing_of_the_weights_that_it_saw(name: str, dcp: Any, device: Any) -> None:
    """torch.distributed.checkpoint makes one; weights that are loaded after it must not be overwritten by others."""
    check_probe(dcp, lambda params: to.AdamW(params, lr=0.01, backend="eager", **PROBED[name]), device)


def test_a_probe_on_every_backend(backend: str, dcp: Any, device: Any) -> None:
    check_probe(dcp, lambda params: to.SGD(params, lr=0.01, momentum=0.9, backend=backend, **PROBED["master"]), device)


@pytest.mark.parametrize("cls", [to.ASGD, to.Rprop, to.Adafactor, to.NAdam])
def test_a_probe_leaves_nothing_of_the_learning_rate_that_it_set(cls: Any, dcp: Any, device: Any) -> None:
    check_probe(dcp, lambda params: cls(params, lr=0.01, backend="eager"), device)


def test_a_probe_with_gradient_release(dcp: Any, device: Any) -> None:
    check_probe(
        dcp, lambda params: to.AdamW(params, lr=0.01, backend="eager", **PROBED["master"]), device, released=True
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_dtypes_are_given_and_saved_by_their_names(dtype: Any, dcp: Any, device: Any) -> None:
    model = half_model(device)
    opt = to.AdamW(model.parameters(), state_dtype=dtype, ema_decay=0.5, ema_dtype=dtype, backend="eager")
    train(list(model.parameters()), opt, range(1))
    assert {opt.param_groups[0][name] for name in ("state_dtype", "ema_dtype")} == {torch.bfloat16}
    assert {opt.state_dict()["param_groups"][0][name] for name in ("state_dtype", "ema_dtype")} == {"bfloat16"}
    assert opt.state[model.weight]["ema"].dtype == torch.bfloat16
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = dcp.get_optimizer_state_dict(model, opt, options=options)
    again = half_model(device)
    other = to.AdamW(again.parameters(), state_dtype="bfloat16", ema_decay=0.5, ema_dtype="bfloat16", backend="eager")
    again.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(again, other, saved, options=options)
    assert_same_optimizers(other, opt)
    opt.param_groups[0]["state_dtype"] = "float32"
    train(list(model.parameters()), opt, range(1, 2))
    assert opt.state[model.weight]["exp_avg"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ["master", "kahan int8", "split24 int4 average", "master, capturable"])
def test_a_checkpoint_goes_into_a_probed_optimizer(name: str, flat: bool, dcp: Any, device: Any, tmp_path: Any) -> None:
    """What torch.distributed.checkpoint writes to disk, read into what it saw in a fresh optimizer."""
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, fresh = half_model(device), half_model(device)
    opt, other = (to.AdamW(m.parameters(), lr=0.01, backend="eager", **PROBED[name]) for m in (model, fresh))
    train(list(model.parameters()), opt, range(3))
    fresh.load_state_dict(model.state_dict())
    saved = {"optimizer": dcp.get_optimizer_state_dict(model, opt, options=options)}
    torch.distributed.checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)
    read = {"optimizer": dcp.get_optimizer_state_dict(fresh, other, options=options)}
    torch.distributed.checkpoint.load(read, checkpoint_id=tmp_path, no_dist=True)
    dcp.set_optimizer_state_dict(fresh, other, read["optimizer"], options=options)
    assert_same_optimizers(other, opt)
    for m, optimizer in ((model, opt), (fresh, other)):
        train(list(m.parameters()), optimizer, range(3, 5))
    assert_same_optimizers(other, opt)


def test_what_is_seen_of_a_probed_optimizer_is_of_the_weights_there_are(dcp: Any, device: Any) -> None:
    model = half_model(device)
    opt = to.AdamW(model.parameters(), backend="eager", param_precision="master")
    first = dcp.get_optimizer_state_dict(model, opt)["state"]["weight"]["master"]
    before = first.clone()
    load_other_weights(model)
    assert torch.equal(dcp.get_optimizer_state_dict(model, opt)["state"]["weight"]["master"], model.weight.float())
    assert torch.equal(first, before), "what was handed out is the caller's"
    assert torch.equal(to.master_state_dict(model, opt)["weight"], model.weight.float())
    dcp.get_optimizer_state_dict(model, opt)
    other_model, other = copy.deepcopy((model, opt))
    load_other_weights(other_model)
    assert not other.state
    dcp.get_optimizer_state_dict(model, opt)
    to.load_master_state_dict(model, opt, {n: torch.ones(p.shape) / 3 for n, p in model.named_parameters()})
    give(list(model.parameters()), 0)
    opt.step()
    assert float((to.master_state_dict(model, opt)["weight"] - 1 / 3).abs().max()) < 2e-3


@pytest.mark.parametrize("how", ["in place", "a new tensor", "loaded"])
def test_what_was_written_after_a_probe_stays(how: str, dcp: Any, device: Any) -> None:
    model = half_model(device)
    opt = to.SGD(model.parameters(), lr=1.0, momentum=1.0, backend="eager")
    saved = dcp.get_optimizer_state_dict(model, opt)
    state = opt.state[model.weight]
    if how == "in place":
        state["momentum_buffer"].fill_(2.0)
    elif how == "a new tensor":
        state["momentum_buffer"] = torch.full_like(model.weight, 2.0)
    else:
        saved["state"]["weight"]["momentum_buffer"] = torch.full_like(model.weight, 2.0)
        dcp.set_optimizer_state_dict(model, opt, saved)
    give(list(model.parameters()), 0)
    opt.step()
    assert torch.equal(opt.state[model.weight]["momentum_buffer"], model.weight.grad + 2)


# What is malformed changes nothing.


def set_state(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda saved: saved["state"][1].update({name: value(saved["state"][1][name]) if callable(value) else value})


MALFORMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no states": (lambda saved: saved.pop("state"), "'param_groups'"),
    "no groups": (lambda saved: saved.pop("param_groups"), "'state'"),
    "states are a list": (lambda saved: saved.update(state=[1]), "by parameter"),
    "groups are a dict": (lambda saved: saved.update(param_groups={}), "a list of dicts"),
    "a group is a list": (lambda saved: saved.update(param_groups=[[0, 1]]), "a list of dicts"),
    "a group without parameters": (lambda saved: saved["param_groups"][0].pop("params"), "a list of dicts"),
    "fewer parameters": (lambda saved: saved["param_groups"][0]["params"].pop(), r"\[1\].*\[2\]"),
    "more groups": (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "number of parameter groups"),
    "a parameter twice": (lambda saved: saved["param_groups"][0].update(params=[1, 1]), "parameter 1 twice"),
    "a parameter too many": (lambda saved: saved["state"].update({7: saved["state"][1]}), r"\[7\]"),
    "a state is none": (lambda saved: saved["state"].update({1: None}), "state of parameter 1"),
    "a state is a tensor": (lambda saved: saved["state"].update({1: torch.ones(3)}), "state of parameter 1"),
    "a moment is missing": (lambda saved: saved["state"][1].pop("exp_avg_sq"), r"parameter 1.*lacks \['exp_avg_sq'\]"),
    "a moment is none": (set_state("exp_avg_sq", None), r"parameter 1.*lacks \['exp_avg_sq'\]"),
    "no step": (lambda saved: saved["state"][1].pop("step"), r"parameter 1.*lacks \['step'\]"),
    "a moment is a number": (set_state("exp_avg", 0.5), "exp_avg of parameter 1 is 0.5"),
    "a moment is a string": (set_state("exp_avg", "zero"), "exp_avg of parameter 1 is 'zero'"),
    "a moment is a list": (set_state("exp_avg", [1.0]), "exp_avg of parameter 1"),
    "a moment is a dict": (set_state("exp_avg", {"a": 1}), "exp_avg of parameter 1"),
    "a moment of another shape": (set_state("exp_avg", torch.ones(4)), "exp_avg of parameter 1 has shape"),
    "integers": (set_state("exp_avg", lambda t: t.long()), "exp_avg of parameter 1 is torch.int64"),
    "codes alone": (set_state("exp_avg", lambda t: t.to(torch.int8)), "exp_avg of parameter 1 is torch.int8"),
    "complex numbers": (set_state("exp_avg", lambda t: t + 0j), "exp_avg of parameter 1 is torch.complex64"),
    "sparse": (set_state("exp_avg", lambda t: t.to_sparse()), "exp_avg of parameter 1 is torch.sparse_coo"),
    "on meta": (set_state("exp_avg", lambda t: t.to("meta")), "exp_avg of parameter 1 is on meta"),
    "step is a string": (set_state("step", "three"), "step of parameter 1 is 'three'"),
    "step is none at all": (set_state("step", lambda t: t / 0 - t / 0), "step of parameter 1"),
    "step is negative": (set_state("step", -1), "step of parameter 1 is -1"),
    "step is a half": (set_state("step", 2.5), "step of parameter 1 is 2.5"),
    "steps of elements": (set_state("step", torch.ones(3)), "step of parameter 1"),
    "an average of another shape": (
        lambda saved: saved["state"][1].update(ema=torch.ones(2), n_averaged=torch.tensor(1.0)),
        "ema of parameter 1",
    ),
    "an average without its count": (
        lambda saved: saved["state"][1].update(ema=torch.ones(3)),
        r"parameter 1.*lacks \['n_averaged'\]",
    ),
    "a master of another shape": (
        lambda saved: saved["state"][1].update(master=torch.ones(4)),
        "master of parameter 1",
    ),
    "a master that is no tensor": (lambda saved: saved["state"][1].update(master=1.0), "master of parameter 1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_state_dict_changes_nothing(name: str) -> None:
    change, says = MALFORMED[name]
    params = parameters((2, 2), (3,))
    opt = to.AdamW(params, backend="eager")
    train(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    change(saved)
    with Unchanged(opt), pytest.raises((ValueError, KeyError, RuntimeError), match=says) as error:
        opt.load_state_dict(saved)
    explains(error)


@pytest.mark.parametrize("what", [None, "state", [1], 3, torch.ones(2)], ids=str)
def test_what_is_no_state_dict(what: Any) -> None:
    opt = to.AdamW(parameters((3,)), backend="eager")
    with pytest.raises(TypeError, match="a state dict is a dict"):
        opt.load_state_dict(what)


@pytest.mark.parametrize(
    ("precision", "change", "says"),
    [
        (
            "master",
            lambda state: state.update(master=state["master"].to(BF16)),
            "master of parameter 0 is torch.bfloat16",
        ),
        ("kahan", lambda state: state.update(compensation=state["compensation"].half()), "compensation of parameter 0"),
        ("split24", lambda state: state.update(residual=state["residual"].float()), "residual of parameter 0"),
        (
            "split32",
            lambda state: state.update(residual_low=state["residual_low"].int()),
            "residual_low of parameter 0",
        ),
        ("split32", lambda state: state.pop("residual"), r"lacks \['residual'\]"),
    ],
)
def test_malformed_corrections(precision: str, change: Any, says: str) -> None:
    params = parameters((2, 3), dtype=BF16)
    opt = to.AdamW(params, backend="eager", param_precision=precision)
    train(params, opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    change(saved["state"][0])
    with Unchanged(opt), pytest.raises((RuntimeError, ValueError), match=says) as error:
        opt.load_state_dict(saved)
    explains(error)


@rows(*(case for case in CASES if not case.sparse))
def test_a_state_that_lacks_anything_is_refused(case: Case) -> None:
    """Of every optimizer: no state is made anew beside others that went on."""
    params = case.parameters(shapes=((4, 3),))
    opt = case.ours(params, **case.settings, backend="eager")
    train(params, opt, range(2))
    full = copy.deepcopy(opt.state_dict())
    names = list(full["state"][0])
    for name in names if len(names) > 1 else []:
        saved = copy.deepcopy(full)
        del saved["state"][0][name]
        with Unchanged(opt), pytest.raises(ValueError, match=rf"parameter 0 holds .* and lacks \['{name}'\]"):
            opt.load_state_dict(saved)
    opt.load_state_dict(full)
