"""What lies around a rule: each wrapper beside float64, on every backend; what they compose to, what they refuse."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from one_step import step_with
from torch.nn import Parameter

import triton_optim
from triton_optim import (
    Wrapper,
    cautious,
    cautious_decay,
    centralized,
    clip_update,
    decoupled_decay,
    lookahead,
    nesterov,
)
from triton_optim.kernels.language import jit

ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-6}


def adam_steps(gradients: list[Any]) -> list[Any]:
    """What Adam subtracts in each step: Kingma & Ba 2015, Algorithm 1."""
    m = v = 0
    steps = []
    for t, g in enumerate(gradients, 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        steps.append(0.05 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6))
    return steps


def of_cautious(p: Any, gradients: list[Any], decay: float) -> Any:
    for u, g in zip(adam_steps(gradients), gradients, strict=True):
        agrees = u * g > 0
        p = p - 0.05 * decay * p - u * agrees / max(np.mean(agrees), 1e-3)
    return p


def of_cautious_decay(p: Any, gradients: list[Any], decay: float) -> Any:
    for u in adam_steps(gradients):
        p = p - u - 0.05 * decay * p * (u * p >= 0)
    return p


def of_independent_decay(p: Any, gradients: list[Any], decay: float) -> Any:
    for u in adam_steps(gradients):
        p = p - u - decay * p
    return p


def of_corrected_decay(p: Any, gradients: list[Any], decay: float) -> Any:
    for u in adam_steps(gradients):
        p = p - u - 0.05**2 / 0.1 * decay * p
    return p


def of_clipping(p: Any, gradients: list[Any], decay: float) -> Any:
    for u in adam_steps(gradients):
        p = p - 0.05 * decay * p - u / max(1, np.sqrt(np.mean(u * u)) / (0.05 * 0.5))
    return p


def of_lookahead(p: Any, gradients: list[Any], decay: float) -> Any:
    slow = p
    for t, u in enumerate(adam_steps(gradients), 1):
        p = p - 0.05 * decay * p - u
        if t % 3 == 0:
            p = slow = slow + 0.25 * (p - slow)
    return p


def of_nesterov(p: Any, gradients: list[Any], decay: float) -> Any:
    v = 0
    for u in adam_steps(gradients):
        v = 0.7 * v - u
        p = p - 0.05 * decay * p + 0.7 * v - u
    return p


def of_centralized(p: Any, gradients: list[Any], decay: float) -> Any:
    rows = [g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 else g for g in gradients]
    for u in adam_steps(rows):
        p = p - 0.05 * decay * p - u
    return p


class Row(NamedTuple):
    """A wrapper, its options, and what it comes to around AdamW."""

    around: Callable[[Any], Any]
    options: dict[str, Any]
    reference: Callable[[Any, list[Any], float], Any]


ROWS = {
    "cautious": Row(cautious, {}, of_cautious),
    "cautious_decay": Row(cautious_decay, {}, of_cautious_decay),
    "independent decay": Row(decoupled_decay, {"decay_by": "independent"}, of_independent_decay),
    "corrected decay": Row(decoupled_decay, {"decay_by": "corrected", "max_lr": 0.1}, of_corrected_decay),
    "clip_update": Row(clip_update, {"clip_threshold": 0.5}, of_clipping),
    "lookahead": Row(lookahead, {"lookahead_steps": 3, "lookahead_alpha": 0.25}, of_lookahead),
    "nesterov": Row(nesterov, {"nesterov_momentum": 0.7}, of_nesterov),
    "centralized": Row(centralized, {}, of_centralized),
}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
SHAPES = [(4, 3), (1030,), (2, 3, 2), ()]


def trained(kind: Any, backend: str, dtype: torch.dtype, steps: int = 7, **options: Any) -> tuple[Any, list[Any]]:
    """An optimizer after some steps, and the parameters and gradients that it had."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    optimizer = kind(params, backend=backend, **options)
    told = [(p.detach().double().numpy().copy(), []) for p in params]
    for _ in range(steps):
        for p, (_, gradients) in zip(params, told, strict=True):
            p.grad = torch.randn(p.shape, dtype=torch.float64).to(dtype)
            p.grad.view(-1)[2:5] = 0  # what never had a gradient does not move, and decays even with caution
            gradients.append(p.grad.double().numpy())
        optimizer.step()
    return optimizer, told


@each_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_is_as_in_float64(row: Row, backend: str, dtype: torch.dtype) -> None:
    options = {**ADAM, "weight_decay": 0.3, **row.options}
    optimizer, told = trained(row.around(triton_optim.AdamW), backend, dtype, **options)
    for p, (start, gradients) in zip(optimizer.param_groups[0]["params"], told, strict=True):
        wanted = row.reference(start, gradients, 0.3)
        close = 1e-10 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=close, atol=close)


@each_row
def test_codecs_clipping_averages_and_device_numbers(row: Row, backend: str) -> None:
    """As the eager backend, which reads and writes by torch's operations."""
    options = {**ADAM, **row.options, "state_dtype": torch.bfloat16, "ema_decay": 0.5, "max_grad_norm": 3.0}
    ends = []
    for which in (backend, "eager"):
        kind = row.around(triton_optim.AdamW)
        optimizer, _ = trained(kind, which, torch.float32, 3, **options, capturable=True)
        ends.append(optimizer)
    for ours, theirs in zip(*(o.param_groups[0]["params"] for o in ends), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ends[0].state[ours]["ema"], ends[1].state[theirs]["ema"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [lookahead(triton_optim.SGD), triton_optim.ScheduleFreeSGD], ids=lambda k: k.__name__)
def test_copies_of_a_parameter_have_what_its_rounding_left(kind: Any, backend: str) -> None:
    p = Parameter(torch.ones(40, dtype=torch.bfloat16))
    optimizer = kind([p], lr=0.0, param_precision="kahan", state_dtype=torch.float32, backend=backend)
    optimizer.state[p]["compensation"] = torch.full_like(p, 2.0**-12, requires_grad=False)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    (copied,) = (optimizer.state[p][name] for name in ("slow", "z") if name in optimizer.state[p])
    assert torch.equal(copied, torch.full((40,), 1 + 2.0**-12))


def test_they_compose(backend: str) -> None:
    kind = lookahead(cautious(triton_optim.Lion))
    optimizer, told = trained(
        kind, backend, torch.float64, lr=0.1, betas=(0.5, 0.75), weight_decay=0.2, lookahead_steps=2
    )
    for parameter, (start, gradients) in zip(optimizer.param_groups[0]["params"], told, strict=True):
        p, slow, m = start, start, 0.0
        for t, g in enumerate(gradients, 1):
            u, m = 0.1 * np.sign(0.5 * m + 0.5 * g), 0.75 * m + 0.25 * g
            p = p * (1 - 0.1 * 0.2) - u * (u * g > 0) / max(np.mean(u * g > 0), 1e-3)
            if t % 2 == 0:
                p = slow = slow + 0.5 * (p - slow)
        np.testing.assert_allclose(parameter.detach().numpy(), p, rtol=1e-12, atol=1e-12)
    assert set(optimizer.state[optimizer.param_groups[0]["params"][0]]) == {"step", "exp_avg", "slow"}


def test_around_one_that_measures(backend: str) -> None:
    """Nesterov's momentum of LAMB's steps, which are as long as the parameter: of one element lr * |p|. The decay is
    beside them.
    """
    p = Parameter(torch.tensor([2.0]))
    optimizer = nesterov(triton_optim.LAMB)([p], lr=0.25, nesterov_momentum=0.5, weight_decay=0.5, backend=backend)
    p.grad = torch.tensor([3.0])
    optimizer.step()
    assert p.item() == pytest.approx(2 * (1 - 0.25 * 0.5) - 0.5 - 0.25)


def test_around_a_prologue(backend: str) -> None:
    """Decay that is independent of the rate, around Muon; and rows without their means before it."""
    ends = []
    for kind, options in (
        (triton_optim.Muon, {"weight_decay": 0.0}),
        (decoupled_decay(triton_optim.Muon), {"weight_decay": 0.25, "decay_by": "independent"}),
    ):
        p = Parameter(torch.eye(3))
        optimizer = kind([p], lr=0.5, backend=backend, **options)
        p.grad = torch.arange(9.0).view(3, 3)
        optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(ends[1], ends[0] - 0.25 * torch.eye(3), atol=1e-6)


def test_a_group_that_has_no_prologue_of_its_own(backend: str) -> None:
    """AdamW's group of Muon behind centralized gradients: Adam's first step goes by lr along the signs."""
    weight, other = Parameter(torch.zeros(2, 2)), Parameter(torch.zeros(1, 3))
    groups = [{"params": [weight]}, {"params": [other], "use_muon": False, "lr": 0.25, "weight_decay": 0.0}]
    optimizer = centralized(triton_optim.Muon)(groups, lr=0.25, backend=backend)
    weight.grad, other.grad = torch.eye(2), torch.tensor([[1.0, 2.0, 6.0]])
    optimizer.step()
    torch.testing.assert_close(other.detach(), torch.tensor([[0.25, 0.25, -0.25]]), rtol=1e-6, atol=1e-6)


@each_row
def test_a_class_is_made_once_and_says_what_it_takes(row: Row) -> None:
    kind = row.around(triton_optim.AdamW)
    assert kind is row.around(triton_optim.AdamW)
    assert issubclass(kind, triton_optim.AdamW)
    taken = inspect.signature(kind).parameters
    assert {"lr", "weight_decay", "state_dtype", *row.options} <= taken.keys()
    assert list(taken)[:3] == ["params", "lr", "betas"]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        kind([Parameter(torch.ones(1))], speed=1.0)


@each_row
def test_copies_and_checkpoints_go_on_alike(row: Row) -> None:
    kind = row.around(triton_optim.AdamW)
    optimizer, _ = trained(kind, "eager", torch.float32, 4, **ADAM, **row.options)
    params = optimizer.param_groups[0]["params"]
    loaded = kind([Parameter(p.detach().clone()) for p in params], **ADAM, **row.options, backend="eager")
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    loaded.load_state_dict(torch.load(stored))
    others = [loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    assert all(type(other) is kind for other in others)
    for step in range(3):
        torch.manual_seed(step)
        gradients = [torch.randn_like(p) for p in params]
        for each in (optimizer, *others):
            step_with(each, each.param_groups[0]["params"], [g.clone() for g in gradients])
    for other in others:
        for p, q in zip(params, other.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)


class OfAUser(cautious(triton_optim.AdamW)):  # type: ignore[misc]
    """A subclass of what a wrapper made, which is found by its name."""


@pytest.mark.parametrize("kind", [lookahead(cautious(triton_optim.SGD)), OfAUser, lookahead(nesterov(OfAUser))])
def test_copies_are_of_the_same_class(kind: Any) -> None:
    """Of a wrapper around another, and of a subclass."""
    optimizer = kind([Parameter(torch.ones(2))], lr=0.1, backend="eager")
    to_a_process = pickle.loads(ForkingPickler.dumps(optimizer))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), to_a_process):
        assert type(other) is kind


def test_hyperparameters_are_those_of_groups() -> None:
    params = [Parameter(torch.zeros(2)), Parameter(torch.zeros(2))]
    groups = [{"params": params[:1]}, {"params": params[1:], "nesterov_momentum": 0.0}]
    optimizer = nesterov(triton_optim.SGD)(groups, lr=1.0, nesterov_momentum=0.5, backend="eager")
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert [p[0].item() for p in params] == [-1.5, -1.0]
    optimizer.param_groups[0]["nesterov_momentum"] = 2.0
    with pytest.raises(ValueError, match=r"Invalid nesterov_momentum: 2\.0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("around", "options", "message"),
    [
        (nesterov, {"nesterov_momentum": 1.0}, "nesterov_momentum: 1.0. It must be at least 0 and below 1"),
        (lookahead, {"lookahead_steps": 0}, "lookahead_steps: 0. Use a whole number from 1 on"),
        (lookahead, {"lookahead_alpha": -0.5}, "lookahead_alpha: -0.5. It must be at least 0"),
        (clip_update, {"clip_threshold": 0.0}, "clip_threshold: 0.0. It must be positive"),
        (decoupled_decay, {"decay_by": "rate"}, "decay_by: 'rate'. Use one of lr, independent, corrected"),
        (decoupled_decay, {"decay_by": "corrected"}, "max_lr: None, with decay_by='corrected'. Give the largest"),
        (cautious, {"weight_decay": -1.0}, "weight_decay value: -1.0"),
    ],
)
def test_wrong_hyperparameters(around: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        around(triton_optim.AdamW)([Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cautious(triton_optim.LAMB), "Cautious can't be around LAMB: both sum over parameters first"),
        (lambda: cautious(triton_optim.Muon), "Cautious can't be around Muon: its rule never sees the gradient"),
        (lambda: clip_update(cautious(triton_optim.SGD)), "around CautiousSGD: both sum over parameters"),
        (lambda: lookahead(lookahead(triton_optim.SGD)), "around LookaheadSGD: it is already"),
        (lambda: cautious(triton_optim.LBFGS), "the class of an optimizer that has a rule"),
        (lambda: cautious(torch.optim.SGD), "the class of an optimizer that has a rule"),
        (
            lambda: nesterov(triton_optim.ASGD)([Parameter(torch.ones(2))]),
            "around ASGD: what its rule adds to a parameter, or keeps, depends on the parameter",
        ),
    ],
)
def test_what_they_are_not_for(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@jit
def halved(base, p, g, states, h, own, w):
    step, *states = base(0.0, g, *states, h)
    return p + w.part * step, *states


def test_a_wrapper_of_a_users_own(backend: str) -> None:
    half = Wrapper("Half", halved, scalars=lambda group, step: {"part": 0.5}, moves_only=True)
    p = Parameter(torch.zeros(3))
    optimizer = half(triton_optim.SGD)([p], lr=1.0, backend=backend)
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == [-0.5] * 3
    assert type(optimizer).__name__ == "HalfSGD"
    twin = copy.deepcopy(optimizer)
    assert type(twin) is type(optimizer)
