"""What a step notes of the hyperparameters: whatever a user does to a group counts in the next step."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from torch.nn import Parameter

import triton_optim
from triton_optim.util.hyperparameters import GroupValues

START: dict[str, Any] = {"params": [], "lr": 0.1, "betas": (0.9, 0.99), "nesterov": False, "mode": "a"}


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        (lambda g: g.update(lr=0.2), False),
        (lambda g: g.update(betas=(0.8, 0.99)), False),
        (lambda g: g.update(lr=1), True),  # another type
        (lambda g: g.update(betas=(0.9, 0.99, 0.9)), True),
        (lambda g: g.update(nesterov=True), True),
        (lambda g: g.update(mode="b"), True),
        (lambda g: g.update(new=1.0), True),
        (lambda g: g.update(decay=g.pop("lr")), True),  # the same object under another name
    ],
)
def test_what_changed_is_read_anew(change: Callable[[dict[str, Any]], None], rebuilt: bool) -> None:
    group, values = dict(START), GroupValues()
    values.read(group)
    before = values.changes, values.rebuilt
    values.read(group)
    assert (values.changes, values.rebuilt) == before
    change(group)
    values.read(group)
    assert values.changes > before[0]
    assert (values.rebuilt > before[1]) == rebuilt
    assert values.plain == {name: value for name, value in group.items() if name != "params"}


def test_a_name_that_changed_is_read_anew() -> None:
    """The same objects in the same order."""
    group, values = {"lr": 0.1, "eps": 0.2}, GroupValues()
    values.read(group)
    before = values.changes
    renamed = {"eps": group["lr"], "lr": group["eps"]}
    values.read(renamed)
    assert values.changes > before
    assert values.plain == renamed


def test_what_changes_in_place_is_read_in_every_step() -> None:
    group, values = START | {"betas": [0.9, 0.99], "lr": torch.tensor(0.1)}, GroupValues()
    values.read(group)
    group["betas"][0] = 0.5
    group["lr"].fill_(0.3)
    values.read(group)
    assert values.plain["betas"] == [0.5, 0.99]
    assert values.plain["lr"] == torch.tensor(0.3).item()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_takes_what_was_changed_in_place(backend: str, capturable: bool, device: torch.device) -> None:
    p = Parameter(torch.zeros(4, device=device))
    p.grad = torch.ones_like(p)
    rate = torch.tensor(0.5, device=device if capturable else "cpu")
    optimizer = triton_optim.SGD([p], lr=rate, capturable=capturable, backend=backend)
    optimizer.step()
    rate.fill_(0.25)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    optimizer.param_groups[0]["maximize"] = True
    optimizer.step()
    assert p.tolist() == [-0.75] * 4


@pytest.mark.parametrize("capturable", [False, True])
def test_an_optimizers_own_number_counts(backend: str, capturable: bool, device: torch.device) -> None:
    class Halved(triton_optim.SGD):
        share = 1.0

        def scalars(self, group: dict[str, Any], step: Any) -> Any:
            h = super().scalars(group, step)
            return h._replace(lr=h.lr * self.share)

    p = Parameter(torch.zeros(4, device=device))
    p.grad = torch.ones_like(p)
    optimizer = Halved([p], lr=1.0, capturable=capturable, backend=backend)
    for share in (1.0, 1.0, 0.5, 0.25):
        optimizer.share = share
        optimizer.step()
    assert p.tolist() == [-2.75] * 4


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_takes_what_was_loaded(backend: str, capturable: bool, device: torch.device) -> None:
    p = Parameter(torch.zeros(4, device=device))
    p.grad = torch.ones_like(p)
    optimizer = triton_optim.SGD([p], lr=1.0, capturable=capturable, backend=backend)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert p.tolist() == [-1.5] * 4


# What a user may put into a group between two steps, as the constructor would not take it.
WRONG: list[tuple[str, str, Any]] = [
    ("AdamW", "lr", -0.1),
    ("AdamW", "lr", float("nan")),
    ("AdamW", "lr", torch.tensor(-0.1)),
    ("AdamW", "lr", torch.ones(2)),
    ("AdamW", "betas", (0.9, 1.5)),
    ("AdamW", "betas", (0.9, 1.0)),
    ("AdamW", "betas", [-0.1, 0.9]),
    ("AdamW", "eps", -1e-8),
    ("AdamW", "weight_decay", -1.0),
    ("AdamW", "ema_decay", 1.5),
    ("AdamW", "ema_decay", -1),
    ("AdamW", "state_dtype", "int16"),
    ("AdamW", "param_precision", "bogus"),
    ("Adam", "betas", (torch.tensor(0.9), 0.99)),
    ("SGD", "momentum", -0.5),
    ("SGD", "nesterov", True),
    ("Lion", "betas", (1.0, 0.99)),
    ("Adadelta", "rho", 1.5),
    ("Adagrad", "lr_decay", -1.0),
    ("Adamax", "betas", (0.9, 1.0)),
    ("ASGD", "weight_decay", -1.0),
    ("NAdam", "momentum_decay", -1.0),
    ("RAdam", "eps", -1.0),
    ("RMSprop", "alpha", -1.0),
    ("Rprop", "etas", (1.5, 1.2)),
    ("Adafactor", "d", 0.5),
    ("Adafactor", "beta2_decay", 0.8),
    ("Adafactor", "eps", (None, -1.0)),
    ("Muon", "ns_steps", 100),
    ("Muon", "ns_coefficients", (1.0, 2.0)),
    ("Muon", "adjust_lr_fn", "bogus"),
    ("LBFGS", "lr", -1.0),
    ("NonlinearCG", "lr", -1.0),
    ("NonlinearCG", "beta", "bogus"),
    ("NonlinearCG", "restart", 0),
    ("SparseAdam", "eps", 0.0),
    ("SparseAdam", "betas", (0.9, 1.0)),
]


def stepping(name: str, device: torch.device, **options: Any) -> tuple[Parameter, Any, Callable[[], Any]]:
    """A parameter, its optimizer, and a step."""
    if name not in ("LBFGS", "NonlinearCG"):
        options["backend"] = "eager"
    p = Parameter(torch.ones(3, 2, device=device))
    optimizer = getattr(triton_optim, name)([p], **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        if name == "SparseAdam":
            p.grad = p.grad.to_sparse()
        return loss

    return p, optimizer, lambda: optimizer.step(closure)


@pytest.mark.parametrize(("name", "option", "value"), WRONG, ids=lambda x: str(x).replace("\n", ""))
def test_a_step_refuses_what_the_constructor_refuses(name: str, option: str, value: Any, device: torch.device) -> None:
    with pytest.raises((ValueError, RuntimeError)) as told:
        stepping(name, device, **{option: value})
    p, optimizer, step = stepping(name, device)
    step()
    before = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    group = optimizer.param_groups[0]
    usual = dict(group)
    group[option] = value
    for _ in range(2):  # and goes on refusing it
        with pytest.raises(told.type, match=re.escape(str(told.value))):
            step()
    assert torch.equal(p, before[0])
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
    group.clear()
    group.update(usual)
    step()


def test_a_first_step_refuses_before_it_makes_states(backend: str, device: torch.device) -> None:
    p = Parameter(torch.ones(2, device=device))
    p.grad = torch.ones_like(p)
    optimizer = triton_optim.AdamW([p], backend=backend)
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    for act in (optimizer.step, optimizer.warmup):
        with pytest.raises(ValueError, match=r"Invalid beta parameter at index 1: 1\.0"):
            act()
    assert not optimizer.state
    assert p.tolist() == [1.0, 1.0]


def test_groups_are_checked_as_the_defaults_are(device: torch.device) -> None:
    p, q = (Parameter(torch.ones(2, 2, device=device)) for _ in range(2))
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        triton_optim.AdamW([{"params": [p], "lr": -1.0}])
    with pytest.raises(ValueError, match="Invalid beta parameter at index 1"):  # of a group that is AdamW's
        triton_optim.Muon([{"params": [p]}, {"params": [q], "use_muon": False, "betas": (0.9, 1.5)}])
    with pytest.raises(RuntimeError, match="`fused` and `foreach`"):
        triton_optim.AdamW([{"params": [p], "fused": True, "foreach": True}])


def test_a_schedule_passes_through_a_rate_of_0(device: torch.device) -> None:
    """SparseAdam refuses it in the constructor, as torch's; a warm-up starts there."""
    p, optimizer, step = stepping("SparseAdam", device)
    optimizer.param_groups[0]["lr"] = 0.0
    step()
    assert p.tolist() == [[1.0, 1.0]] * 3


def test_what_stays_is_checked_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer, step = stepping("AdamW", device, state_dtype=torch.bfloat16)
    checks: list[Any] = []
    check = triton_optim.AdamW.check_hyperparameters
    monkeypatch.setattr(triton_optim.AdamW, "check_hyperparameters", lambda *a: checks.append(a) or check(*a))
    for _ in range(4):
        step()
    assert len(checks) == 1
    optimizer.param_groups[0]["lr"] = 0.5
    step()
    step()
    assert len(checks) == 2


NUMPYS = [np.float16, np.float32, np.float64, np.array, torch.tensor]
each_kind = pytest.mark.parametrize("kind", NUMPYS, ids=lambda kind: kind.__name__)


@each_kind
@pytest.mark.parametrize("name", sorted({name for name, *_ in WRONG} - {"SparseAdam"}))
def test_numbers_of_numpy_and_tensors_are_numbers(name: str, kind: Any, device: torch.device) -> None:
    """Of values that all of these have exactly."""
    options: dict[str, Any] = {"lr": 0.5}
    usual = getattr(triton_optim, name)([Parameter(torch.ones(2, 2))]).defaults
    options |= {n: v for n, v in {"weight_decay": 0.25, "momentum": 0.5, "ema_decay": 0.5}.items() if n in usual}
    options |= {"betas": (0.5, 0.75)} if "betas" in usual else {}

    def of_kind(value: Any) -> Any:
        return tuple(map(kind, value)) if isinstance(value, tuple) else kind(value)

    found = []
    for change in (lambda x: x, of_kind):
        p, optimizer, step = stepping(name, device, **{n: change(v) for n, v in options.items()})
        step()
        for n, v in options.items():
            optimizer.param_groups[0][n] = change(tuple(x / 2 for x in v) if isinstance(v, tuple) else v / 2)
        step()
        found.append(p.detach())
    assert torch.equal(*found)


# What these are about is done before a backend is called: compiling graphs would add nothing.
uncompiled = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values != ("compiled",)])


@uncompiled
@pytest.mark.parametrize("capturable", [False, True])
def test_numbers_of_numpy_on_every_backend(backend: str, capturable: bool, device: torch.device) -> None:
    found = []
    for real, whole in ((float, int), (np.float32, np.int64)):
        p = Parameter(torch.ones(64, dtype=torch.bfloat16, device=device))
        p.grad = torch.full_like(p, 0.3)
        options = {"lr": real(0.125), "momentum": real(0.5), "dampening": real(0.25), "seed": whole(5)}
        optimizer = triton_optim.SGD(
            [p], **options, max_grad_norm=real(2), param_precision="stochastic", capturable=capturable, backend=backend
        )
        optimizer.step()
        optimizer.param_groups[0] |= {"lr": real(0.25), "seed": whole(2**40 + 3)}
        optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


MOMENTUM_LATER = [
    {},
    {"ema_decay": 0.9},
    {"param_precision": "stochastic"},
    {"param_precision": "master", "ema_decay": 0.9, "ema_dtype": torch.bfloat16},
    {"amp": "fused"},
    {"amp": "fused", "capturable": True, "max_grad_norm": 100.0},
    {"param_precision": "split24", "capturable": True},
]


@uncompiled
@pytest.mark.parametrize("options", MOMENTUM_LATER, ids=str)
def test_momentum_that_is_switched_on_starts_with_the_gradient(
    options: dict[str, Any], backend: str, device: torch.device
) -> None:
    """Whatever else the options keep and count."""
    halves = any(name.startswith("param") for name in options)
    found = []
    for make in (torch.optim.SGD, partial(triton_optim.SGD, backend=backend, **options)):
        p = Parameter(torch.ones(4, device=device, dtype=torch.bfloat16 if halves else torch.float32))
        optimizer = make([p], lr=0.125, dampening=0.5)
        for k in range(5):
            optimizer.param_groups[0]["momentum"] = 0.5 if k in (2, 4) else 0.0  # off, and on again: the buffer stays
            p.grad = torch.full_like(p, 0.5)  # of which all sums are exact
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_matrices_that_become_adamws_start_anew(device: torch.device) -> None:
    """Their count is AdamW's from the first update on, though Muon's group counted for its random bits."""
    p, q = (Parameter(torch.ones(2, 2, dtype=torch.bfloat16, device=device)) for _ in range(2))
    adamw = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = triton_optim.Muon([p], param_precision="stochastic", backend="eager", seed=3)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    with torch.no_grad():
        p.fill_(1)
    optimizer.param_groups[0] |= adamw | {"use_muon": False}
    other = triton_optim.AdamW([q], **adamw, param_precision="stochastic", backend="eager", seed=3)
    for _ in range(2):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        other.step()
    assert torch.equal(p, q)
    assert optimizer.state[p]["step"] == 2
