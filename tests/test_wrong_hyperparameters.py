"""Hyperparameters that are out of range, of the wrong type or a text: the errors are torch's, and nothing changes."""

import pytest
import torch
from complaints import explains, raised_by
from side_by_side import leaf, ours, torchs
from table import CASES, each_case, each_kind, rows
from torch.nn import Parameter

import triton_optim

BY_NAME = {case.name: case for case in CASES}


# Hyperparameters


def wrong_hyperparameters(case):
    """Each number that a group keeps, one at a time, where it may not be: below 0, NaN, 1.5; of tuples each place."""
    started = ours(case, case.parameters()).param_groups[0]
    for name, value in started.items():
        for wrong in (-0.25, -1.5, float("nan"), 1.5):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield {name: wrong}, wrong
            elif isinstance(value, tuple) and name != "params":
                for i in range(len(value)):
                    yield {name: (*value[:i], wrong, *value[i + 1 :])}, wrong
    yield {"lr": torch.tensor(-0.5)}, -0.5
    yield {"lr": torch.tensor([0.1, 0.2])}, "1-element"


# Of those that AdamW has no word for, the ones that may be below 0.
NEGATIVE = {"decay_rate", "dampening", "ns_coefficients"}


def as_torchs(case, name):
    """Whether torch's, or AdamW, has a number of this name, or as many."""
    own, theirs = case.defaults().get(name), torchs(case)(leaf()).defaults.get(name)
    count = [len(value) if isinstance(value, tuple) else 0 for value in (own, theirs)]
    return theirs is not None and count[0] == count[1]


@each_case
def test_wrong_hyperparameter(case, device):
    """Whatever torch refuses, the same way, and by name."""
    refused = set()
    for arguments, cause in wrong_hyperparameters(case):
        try:
            if case.torchs or all(as_torchs(case, name) for name in arguments):
                torchs(case)(case.parameters(device), **arguments)
            elif cause < 0 and not arguments.keys() & NEGATIVE:  # what torch has no word for is at least 0
                raise ValueError
        except Exception as error:
            expected = type(error)
        else:
            continue
        with pytest.raises(expected) as error:
            case.ours(case.parameters(device), **arguments)
        explains(error, cause)
        refused |= arguments.keys()
    assert "lr" in refused
    for name in ("betas", "eps", "weight_decay", "momentum", "etas", "rho"):
        wanted = isinstance(case.defaults().get(name), (int, float, tuple))
        assert name in refused or not wanted or case.name in ("Adafactor", "Muon", "Rprop"), name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"momentum": 0.0, "nesterov": True}, ["Nesterov", "momentum"]),
        ({"momentum": 0.9, "dampening": 0.25, "nesterov": True}, ["Nesterov", "dampening"]),
    ],
    ids=str,
)
def test_nesterov_of_sgd(arguments, named, device):
    case = BY_NAME["SGD"]
    with pytest.raises(raised_by(lambda: case.torchs(case.parameters(device), **arguments))) as error:
        case.ours(case.parameters(device), **arguments)
    explains(error, *named)


@each_kind
@pytest.mark.parametrize("other", ["foreach", "differentiable"])
def test_fused_and_another_way_to_run(case, other, device):
    """Of those whose fused=True torch has none, what it raises for AdamW."""
    arguments = {"fused": True, other: True}
    with pytest.raises(raised_by(lambda: torch.optim.AdamW(leaf(), **arguments))) as error:
        case.ours(case.parameters(device), **arguments)
    explains(error, "fused", other)


@each_case
@pytest.mark.parametrize(
    "arguments", [{"lr": None}, {"lr": "0.1"}, {"learning_rate": 0.1}], ids=["no lr", "lr a string", "unknown argument"]
)
def test_hyperparameter_of_the_wrong_type(case, arguments, device):
    if arguments == {"lr": None} and case.defaults()["lr"] is None:
        pytest.skip("it needs no learning rate")
    with pytest.raises(raised_by(lambda: torchs(case)(case.parameters(device), **arguments))):
        case.ours(case.parameters(device), **arguments)


@rows(*(case for case in CASES if "betas" in case.defaults()))
@pytest.mark.parametrize("betas", [0.9, None, (0.9,)], ids=str)
def test_betas_of_the_wrong_form(case, betas, device):
    with pytest.raises(raised_by(lambda: torchs(case)(case.parameters(device), betas=betas))):
        case.ours(case.parameters(device), betas=betas)


TEXTS = {  # what YAML makes of 1e-3
    "lr": lambda p: triton_optim.SGD(p, lr="1e-3"),
    "eps": lambda p: triton_optim.AdamW(p, eps="1e-8"),
    "beta": lambda p: triton_optim.AdamW(p, betas=("0.9", 0.99)),
    "max_grad_norm": lambda p: triton_optim.AdamW(p, max_grad_norm="1e-3"),
    "ema_decay": lambda p: triton_optim.AdamW(p, ema_decay="1e-3"),
}


@pytest.mark.parametrize(("name", "made"), TEXTS.items(), ids=TEXTS)
def test_a_number_given_as_text(name, made):
    with pytest.raises(TypeError) as error:
        made([Parameter(torch.ones(3))])
    explains(error, name if name != "lr" else "learning rate", "of type str", "must be a number", "1.0e-3")


def test_hyperparameters_that_are_too_many_or_infinite():
    p = [Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"Invalid betas: \(0.9, 0.99, 0.999\). It must be 2 numbers"):
        triton_optim.AdamW(p, betas=(0.9, 0.99, 0.999))
    with pytest.raises(ValueError, match=r"Invalid learning rate: inf. It must be at least 0 and finite"):
        triton_optim.AdamW(p, lr=float("inf"))
