"""Parameters of lazy modules, which have no shape before the first forward: taken, and stepped once they have one."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from table import KINDS, Case, rows
from torch import nn

import triton_optim

TAKES = [case for case in KINDS if not case.matrices and case.name != "Adagrad"]  # torch's makes states at once
CLOSURE_DRIVEN = ["LBFGS", "NonlinearCG"]


def lazy_model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that lazy modules are under development
        return nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).to(device)


def trained(make: Any, device: torch.device, sparse: bool = False, act: Any = None) -> list[torch.Tensor]:
    """Two steps before the first forward, and three after it."""
    model = lazy_model(device)
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.step()
    if act is not None:
        act(model, optimizer)
    for _ in range(3):
        model(torch.ones(1, 4, device=device)).square().sum().backward()
        if sparse:
            for p in model.parameters():
                p.grad = p.grad.to_sparse()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@rows(*TAKES)
def test_lazy_parameters_are_trained_as_by_torch(case: Case, device: torch.device) -> None:
    ours = trained(lambda ps: case.ours(ps, backend="eager"), device, case.sparse)
    for a, b in zip(ours, trained(case.peer, device, case.sparse), strict=True):
        torch.testing.assert_close(a, b)


def test_states_that_are_made_at_once_wait_for_the_shape(device: torch.device) -> None:
    own = partial(triton_optim.Adagrad, initial_accumulator_value=0.5, backend="eager")
    model = lazy_model(device)
    model(torch.ones(1, 4, device=device))
    theirs = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    for _ in range(3):
        theirs.zero_grad()
        model(torch.ones(1, 4, device=device)).square().sum().backward()
        theirs.step()
    for a, b in zip(trained(own, device), model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())


OPTIONS = [{"max_grad_norm": 1e9}, {"ema_decay": 0.9}, {"state_dtype": torch.float32}, {"capturable": True}]


@pytest.mark.parametrize("options", [{"backend": b} for b in ("cpp", "eager")] + OPTIONS, ids=str)
def test_whatever_the_options(options: dict[str, Any], device: torch.device, gradients_are: None) -> None:
    def act(model: nn.Module, optimizer: Any) -> None:
        optimizer.warmup()
        triton_optim.explain(optimizer)
        triton_optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()

    if options.get("backend") == "cpp" and device.type != "cpu":
        pytest.skip("C++ is for the CPU")
    ours = trained(lambda ps: triton_optim.AdamW(ps, **options), device, act=act)
    for a, b in zip(ours, trained(torch.optim.AdamW, device), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_lazy_parameters_are_released(device: torch.device) -> None:
    def make(params: Any) -> Any:
        optimizer = triton_optim.AdamW(params, backend="eager")
        triton_optim.enable_gradient_release(optimizer)
        return optimizer

    for a, b in zip(trained(make, device), trained(torch.optim.AdamW, device), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CLOSURE_DRIVEN)
def test_closures_give_lazy_parameters_their_shape(name: str, device: torch.device) -> None:
    model = lazy_model(device)
    optimizer = getattr(triton_optim, name)(model.parameters(), max_iter=4)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4, device=device)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first


def test_muon_needs_to_know_the_shape(device: torch.device) -> None:
    with pytest.raises(ValueError, match="parameter 0 is uninitialized"):
        triton_optim.Muon(lazy_model(device).parameters())
    triton_optim.Muon([{"params": lazy_model(device).parameters(), "use_muon": False}])
