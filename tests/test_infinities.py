"""What a hyperparameter of 0 switches off leaves no trace, though 0 times infinity is NaN: as in torch's for-loop."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from table import CASES
from torch import Tensor
from torch.nn import Parameter

import triton_optim

INF, NAN = float("inf"), float("nan")
PEERS = {case.name: case for case in CASES}
BF16 = torch.bfloat16

# Options of which each is 0 in some, and each optimizer's other forms.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    case.name: [*case.variants.values()] for case in CASES if case.elementwise and not case.sparse
} | {
    "SGD": [
        {"momentum": m, "dampening": d, "weight_decay": w}
        for m, d, w in ((0, 0, 0), (0.9, 0, 0), (0.9, 0.5, 0), (0.9, 1, 0), (0.9, 0.5, 0.1), (0, 0, 0.1))
    ]
    + [{"momentum": 0.9, "nesterov": True}, {"lr": 0.0, "momentum": 0.9}, {"maximize": True}],
    "Adam": [
        {"betas": b, "weight_decay": w, "amsgrad": a}
        for b, w, a in (((0.9, 0.99), 0, False), ((0.0, 0.0), 0, True), ((0.9, 0.99), 0.1, False))
    ]
    + [{"lr": 0.0}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "AdamW": [{"weight_decay": 0}, {"weight_decay": 0, "amsgrad": True}, {"lr": 0.0}],
    "Lion": [{}, {"betas": (0.0, 0.0)}, {"weight_decay": 0.1}],
    "Adadelta": [{"rho": r, "weight_decay": w} for r, w in ((0.9, 0), (0, 0), (1, 0), (0.9, 0.1))],
    "Adagrad": [{"lr_decay": 0.1}, {"weight_decay": 0.1}, {}],
    "Adamax": [{}, {"betas": (0.0, 0.0)}, {"weight_decay": 0.1}],
    "ASGD": [
        {"lambd": n, "weight_decay": w, "t0": t} for n, w, t in ((0, 0, 1e6), (0, 0, 0), (0.1, 0, 0), (0.1, 0.1, 1e6))
    ],
    "NAdam": [
        {"weight_decay": w, "momentum_decay": m, "decoupled_weight_decay": d}
        for w, m, d in ((0, 0, False), (0, 0.1, True), (0.1, 0.1, False), (0.1, 0, True))
    ],
    "RAdam": [{}, {"betas": (0.0, 0.5)}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "RMSprop": [
        {"alpha": a, "weight_decay": w, "momentum": m}
        for a, w, m in ((0.9, 0, 0), (0, 0, 0), (1, 0, 0.9), (0.9, 0.1, 0.9))
    ]
    + [{"centered": True}],
    "Rprop": [{}],
}
each_case = pytest.mark.parametrize("name", OPTIONS)


def grid(*of_each: list[float]) -> list[Tensor]:
    return list(torch.tensor(list(product(*of_each))).T.contiguous())


def values(p: Tensor, optimizer: Any) -> dict[str, Tensor]:
    return {"p": p.detach().clone()} | {n: v.clone() for n, v in optimizer.state[p].items() if n != "step"}


def assert_no_worse(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """What is finite or an infinity in torch is the same; what is NaN there is not finite."""
    for name, a in theirs.items():
        b, known = ours[name], ~a.isnan()
        torch.testing.assert_close(b[known], a[known], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert not b[~known].isfinite().any(), name


def trained(make: Any, start: Tensor, gradients: list[Tensor], saved: Any = None) -> list[dict[str, Tensor]]:
    p = Parameter(start.clone())
    optimizer = make([p])
    if saved is not None:
        optimizer.load_state_dict(copy.deepcopy(saved))
    seen = []
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        seen.append(values(p, optimizer))
    return seen


@each_case
def test_parameters_and_gradients_that_are_not_finite(name: str, backend: str, device: torch.device) -> None:
    several = OPTIONS[name]
    if backend == "compiled":
        if name != "SGD":
            pytest.skip("one rule is compiled: its words are those of all")
        several = several[2:3]  # momentum and dampening without decay
    case, loop = PEERS[name], {"foreach": False}
    p, g = (x.to(device) for x in grid([0.5, 0.0, -INF, INF, NAN], [0.25, 0.0, INF, -INF, NAN]))
    gradients = [g, torch.full_like(g, 0.25), -g]
    for options in several:
        options = {"lr": 0.1, **options}
        theirs = trained(partial(case.peer, **options, **loop), p, gradients)
        ours = trained(partial(case.ours, **options, backend=backend), p, gradients)
        for a, b in zip(ours, theirs, strict=True):
            assert_no_worse(a, b)


@each_case
def test_states_that_are_not_finite(name: str, device: torch.device) -> None:
    """A state of each kind, in a checkpoint of torch's that ours goes on from, too."""
    p, g, held = (x.to(device) for x in grid([0.5, -INF], [0.25, 0.0, INF], [0.5, 0.0, INF, NAN]))
    loop = {"foreach": False}
    for options in OPTIONS[name]:
        if "centered" in options:
            continue  # of what differs by less than 0, torch's root is NaN
        first, options = Parameter(torch.ones_like(p)), {"lr": 0.1, **options}
        makes = partial(PEERS[name].peer, **options, **loop), partial(PEERS[name].ours, **options, backend="eager")
        saver = makes[0]([first])
        first.grad = torch.full_like(p, 0.25)
        saver.step()
        for state in [n for n, v in saver.state[first].items() if isinstance(v, Tensor) and v.dim()]:
            saved = copy.deepcopy(saver.state_dict())
            saved["state"][0][state] = held
            theirs, ours = (trained(make, p, [g], saved)[0] for make in makes)
            assert_no_worse(ours, theirs)


def test_a_sparse_gradient_leaves_infinite_parameters(device: torch.device) -> None:
    found = []
    for cls in (torch.optim.SparseAdam, triton_optim.SparseAdam):
        p = Parameter(torch.tensor([[-INF], [0.5], [INF]], device=device))
        optimizer = cls([p], lr=0.1)
        for _ in range(2):
            index = torch.tensor([[0, 1]], device=device)
            p.grad = torch.sparse_coo_tensor(index, torch.ones(2, 1, device=device), (3, 1), check_invariants=True)
            optimizer.step()
        found.append(values(p, optimizer))
    assert_no_worse(found[1], found[0])
    assert found[1]["p"][0] == -INF


@pytest.mark.parametrize("state_dtype", [None, BF16, "int8", "int4"])
@pytest.mark.parametrize("precision", ["storage", "stochastic", "kahan", "split24", "split32", "master"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_infinite_parameters_however_they_are_kept(
    dtype: torch.dtype, precision: str, state_dtype: Any, device: torch.device
) -> None:
    for cls, options in ((triton_optim.SGD, {"momentum": 0.9}), (triton_optim.Adam, {})):
        p = Parameter(torch.full((64, 64), 0.5, dtype=dtype, device=device))
        with torch.no_grad():
            p[0, 0], p[1, 1] = -INF, INF
        kept = {"param_precision": precision, "state_dtype": state_dtype}
        optimizer = cls([p], lr=0.1, ema_decay=0.9, backend="eager", **options, **kept)
        for _ in range(3):
            p.grad = torch.full_like(p, 0.25)
            optimizer.step()
        for value in (p, optimizer.state[p]["ema"]):
            assert (value[0, 0], value[1, 1]) == (-INF, INF)
            assert int((~value.isfinite()).sum()) == 2
        moments = [
            v for n, v in optimizer.state[p].items() if n.startswith(("momentum", "exp")) and v.dtype != torch.int8
        ]
        assert all(v.isfinite().all() for v in moments)


each_backend_but_compiled = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values != ("compiled",)])


@each_backend_but_compiled
def test_equal_gradients_have_no_deviation_below_0(backend: str, device: torch.device) -> None:
    """Of equal gradients square_avg - grad_avg**2 is 0 and rounds to less, of which the root is NaN, as in torch."""
    g = torch.linspace(0.1, 3, 4096, device=device)
    p = Parameter(torch.zeros_like(g))
    optimizer = triton_optim.RMSprop([p], lr=1e-9, alpha=0.7, centered=True, backend=backend)
    for _ in range(50):
        p.grad = g.clone()
        optimizer.step()
    state = optimizer.state[p]
    assert (state["square_avg"] - state["grad_avg"].square() < 0).any()
    assert p.isfinite().all()


@each_backend_but_compiled
def test_an_average_of_infinities_is_theirs(backend: str, device: torch.device) -> None:
    """And with a decay of 0 nothing of the old one is left."""
    for decay, last in ((0.9, [-INF, INF, NAN, 0.5]), (0.0, [0.5, INF, -INF, 0.5])):
        p = Parameter(torch.tensor([-INF, INF, INF, 0.5], device=device))
        optimizer = triton_optim.SGD([p], lr=0.0, ema_decay=decay, backend=backend)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        with torch.no_grad():
            p.copy_(torch.tensor([-INF if decay else 0.5, INF, -INF, 0.5]))
        optimizer.step()
        expected = torch.tensor(last, device=device)
        torch.testing.assert_close(optimizer.state[p]["ema"], expected, equal_nan=True, rtol=0, atol=0)


def test_a_skipped_step_leaves_the_average_of_what_has_no_gradient(device: torch.device) -> None:
    params = [Parameter(torch.ones(2, device=device)) for _ in range(2)]
    optimizer = triton_optim.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.9, amp="fused")
    for skip in (0.0, 1.0):
        params[0].grad = torch.ones_like(params[0])
        params[1].grad = None if skip else torch.ones_like(params[1])
        if skip:
            with torch.no_grad():
                params[1][0] = -INF
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device=device), torch.full((1,), skip, device=device)
        before = optimizer.state[params[1]].get("ema", torch.zeros(0)).clone()
        optimizer.step()
    assert torch.equal(optimizer.state[params[1]]["ema"], before)


@pytest.mark.parametrize("size", [3e19, 1e-22])
@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "RMSprop", "Adadelta"])
def test_a_second_moment_is_no_more_out_of_range_than_torchs(name: str, size: float, device: torch.device) -> None:
    """The square of the gradient is a number where its share is one."""
    g = torch.full((3,), size, device=device)
    theirs, ours = (
        trained(make, torch.ones_like(g), [g])[0]
        for make in (getattr(torch.optim, name), lambda ps: getattr(triton_optim, name)(ps, backend="eager"))
    )
    del theirs["p"]  # of which parts of torch's own may be out of range
    assert_no_worse(ours, theirs)
