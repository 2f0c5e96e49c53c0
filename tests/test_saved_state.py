"""What is saved says how it is read: quantized states, in other readers and in other classes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from complaints import Unchanged, explains
from saved_optimizers import give, moments, parameters, train, trained, twin
from table import CASES
from torch.nn import Parameter

import triton_optim as to
from triton_optim.kernels.rules.adam import adam
from triton_optim.spec import State, Variant

RULES = [case for case in CASES if case.elementwise and not case.sparse]


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
