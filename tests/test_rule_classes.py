"""What a class says of its rule is checked against it: states, arguments, scalars, names."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from own_rules import BACKENDS, Own, optimizer_of
from own_rules import defined as defined
from torch.nn import Parameter

import triton_optim
from triton_optim import RuleOptimizer
from triton_optim.kernels.language import RuleError, jit
from triton_optim.spec import State


@jit
def one_state(p, g, m, h):
    return p - g, m


@jit
def returns_too_much(p, g, m, h):
    return p - g, m, g


@jit
def returns_too_little(p, g, m, h):
    return (p - g,)


def test_the_states_of_a_rule_are_counted() -> None:
    p = Parameter(torch.zeros(3))
    with pytest.raises(RuleError, match="takes 1 states, and its optimizer has 2"):
        type("Two", (Own,), {"rule": one_state, "states": (State("m"), State("v"))})([p])
    for rule, count in ((returns_too_much, 3), (returns_too_little, 1)):
        with pytest.raises(RuleError, match=f"returned {count} values; .* a tuple of p and its 1 states"):
            optimizer_of(rule)([p])
    with pytest.raises(RuleError, match="must be a @jit function; got 'sgd'"):
        optimizer_of("sgd")([p])

    @jit
    def of_anything(p, *rest):
        return p, rest[1]

    with pytest.raises(RuleError, match="is no rule: a rule takes p, g, its states and h"):
        optimizer_of(of_anything)([p])


@jit
def turned(p, g, square, mean, h):
    return p - h.lr * mean, square, mean


@jit
def gradient_first(grad, p, m, h):
    return p - h.lr * grad, m


def test_arguments_in_another_order() -> None:
    """Names that would mean each other's values; which others a rule has for its states is its own affair."""
    p = Parameter(torch.zeros(3))
    states = (State("mean"), State("square"))
    with pytest.raises(RuleError, match=r"takes its states as square, mean, and .* declares them as mean, square"):
        type("Turned", (Own,), {"rule": turned, "states": states})([p])
    type("Renamed", (Own,), {"rule": turned, "states": (State("m"), State("v"))})([p])
    with pytest.raises(RuleError, match=r"takes grad first, where the parameter is given. Give it p, g"):
        optimizer_of(gradient_first)([p])


def test_a_class_without_a_rule_and_a_rule_without_a_name() -> None:
    with pytest.raises(TypeError, match=r"Bare has no rule. Set `rule = ...`"):
        type("Bare", (triton_optim.RuleOptimizer,), {})([Parameter(torch.zeros(3))], {"lr": 0.1})
    with pytest.raises(
        RuleError, match=r"a lambda is no rule \(.*test_rule_classes.py, line \d+\).* Define the rule by def"
    ):
        jit(lambda p, g, h: (p - h.lr * g,))


@jit
def descends(p, g, m, h):
    return p - h.lr * g, m


def test_options_among_the_hyperparameters() -> None:
    """As the optimizers of torch have them there; those by keyword count."""
    p = Parameter(torch.zeros(3))
    p.grad = torch.full((3,), 2.0)
    base = optimizer_of(descends)
    optimizer = base([p], maximize=False)
    for given, moved in (({"maximize": True}, 1), ({"maximize": True, "max_grad_norm": 0.1}, 1), ({}, -1)):
        kind = type("Given", (base,), {"__init__": lambda self, params, given=given: RuleOptimizer.__init__(
            self, params, {**optimizer.defaults, **given})})  # fmt: skip
        q = Parameter(torch.zeros(3))
        q.grad = p.grad
        own = kind([q])
        own.step()
        assert torch.equal(q.sign(), torch.full((3,), float(moved)))
        assert own.max_grad_norm == given.get("max_grad_norm")
    with pytest.raises(ValueError, match="max_grad_norm"):
        type("Given", (base,), {"__init__": lambda self, params: RuleOptimizer.__init__(
            self, params, {**optimizer.defaults, "max_grad_norm": -1.0})})([p])  # fmt: skip


STARTS = {
    "too small": lambda p, _: torch.ones(1),
    "on meta": lambda p, _: torch.empty_like(p, device="meta"),
    "nothing": lambda p, _: None,
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_state_that_starts_unlike_its_parameter(start: Any, backend: str, device: torch.device) -> None:
    """Compiled code would read past its end."""
    p = Parameter(torch.zeros(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = type("Odd", (Own,), {"rule": one_state, "states": (State("m", start=start),)})([p], backend=backend)
    with pytest.raises(TypeError, match=r"Odd starts its state m with .* Return a number, or a new tensor like"):
        optimizer.step()
    assert p.tolist() == [0, 0, 0]


def test_every_variant_is_checked_at_construction(defined: Any) -> None:
    """Not when it is switched to in the middle of a training."""
    fault, _ = defined("g = g ** 0.5")
    variants = (triton_optim.Variant(one_state, (State("m"),)), triton_optim.Variant(fault, (State("m"),)))
    with pytest.raises(RuleError, match="Write sqrt"):
        type("Switched", (Own,), {"variants": variants})([Parameter(torch.zeros(3))])


@jit
def misspelt(p, g, m, h):
    return p - h.lrr * g, m


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_an_error_in_scalars_is_what_is_raised(backend: str) -> None:
    """And not what a backend failed with, which another might do without."""
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = type("Faulty", (Own,), {"rule": one_state, "scalars": lambda self, group, step: group["lrr"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match=r"^'lrr'$"):
            optimizer([p], backend=backend).step()


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_scalar_that_is_not_there(backend: str) -> None:
    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = optimizer_of(misspelt)([p], backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuleError, match=r"uses `h.lrr` \(.*line \d+\), and scalars\(\) returned no lrr; .*lr, a"):
            optimizer.step()
    assert p.tolist() == [0, 0, 0]
