"""Checkpoints that are not what they should be are refused, and change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from complaints import Unchanged, explains
from conftest import BACKENDS
from saved_optimizers import BF16, give, moments, parameters, train, trained, twin
from table import CASES, Case, rows

import triton_optim as to

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


def test_codes_that_do_not_say_how_they_are_read() -> None:
    """As they are held, and as they once were saved."""
    params, opt = trained(to.AdamW, state_dtype="int8")
    saved = opt.state_dict()
    saved["state"][0] = dict(opt.state[params[0]])
    with Unchanged(opt), pytest.raises(RuntimeError, match="does not say how") as error:
        opt.load_state_dict(saved)
    explains(error, "exp_avg of parameter 0", "to_torch_state_dict")


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


OTHERS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "shape": ("int8", lambda state: state.update(exp_avg=torch.zeros(4095))),
    "int32": ("int8", lambda state: state.update(exp_avg=state["exp_avg"].to(torch.int32))),
    "uint8": ("int8", lambda state: state.update(exp_avg=state["exp_avg"].to(torch.uint8))),
    "fewer": ("int8", lambda state: state.update(exp_avg=state["exp_avg"][:-1])),
    "rows": ("int8", lambda state: state.update(exp_avg=state["exp_avg"].view(16, 256))),
    "complex": ("int8", lambda state: state.update(exp_avg=torch.zeros(4096, dtype=torch.complex64))),
    "float": ("int8", lambda state: state.update(exp_avg=0.0)),
    "fewer scales": ("int8", lambda state: state.update(exp_avg_scale=state["exp_avg_scale"][:-1])),
    "one scale": ("int8", lambda state: state.update(exp_avg_scale=torch.tensor(1.0))),
    "scales for half an item": ("int4", lambda state: state.update(exp_avg_scale=torch.ones(4096, dtype=BF16))),
    "double scales": ("int8", lambda state: state.update(exp_avg_scale=state["exp_avg_scale"].double())),
    "listed scales": ("int8", lambda state: state.update(exp_avg_scale=state["exp_avg_scale"].tolist())),
    "no scales": ("int8", lambda state: state.pop("exp_avg_scale")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_state_in_place_of_codes(name: str, device: Any) -> None:
    state_dtype, wrong = OTHERS[name]
    params = parameters((5,), (4096,), device=device)
    opt = to.AdamW(params, state_dtype=state_dtype, backend="eager")
    train(params, opt, range(2))
    wrong(opt.state[params[1]])
    before = [p.detach().clone() for p in params]
    give(params, 2)
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 1") as error:
        opt.step()
    explains(error, "parameter 1")
    assert all(map(torch.equal, params, before))
    assert opt.state[params[0]]["step"] == 2


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
