"""Sophia-G's estimate of the Hessian, between steps. What every optimizer has is tested by its row."""

from __future__ import annotations

from typing import Any

import pytest
import references_more as more
import torch
from torch.nn import Parameter

import triton_optim

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.5, 0.75), "rho": 0.1, "bs": 2, "weight_decay": 0.1}
# Of these gradients the second and the fifth are of sampled labels.
ESTIMATES = (1, 4)


def trained(p: Parameter, gradients: list[torch.Tensor], **options: Any) -> triton_optim.SophiaG:
    optimizer = triton_optim.SophiaG([p], **SETTINGS, **options)
    for i, g in enumerate(gradients):
        p.grad = g.clone()
        (optimizer.update_hessian if i in ESTIMATES else optimizer.step)()
    return optimizer


def gradients_for(p: torch.Tensor) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=random).to(p) for _ in range(7)]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 100.0}, {"capturable": True}], ids=str)
def test_estimates_between_steps(backend: str, options: dict[str, Any], device: torch.device) -> None:
    p = Parameter(torch.linspace(-1, 1, 12, device=device).view(4, 3))
    gradients, start = gradients_for(p), p.detach().clone()
    optimizer = trained(p, gradients, backend=backend, **options)
    wanted, state = start.cpu().double().numpy(), {}
    for i, g in enumerate(gradients):
        g = g.cpu().double().numpy()
        if i in ESTIMATES:
            more.sophia_estimate(wanted, g, state, SETTINGS["betas"])
        else:
            wanted = more.sophia.__wrapped__(wanted, g, state, **SETTINGS)
    assert (abs(state["exp_avg"]) < 0.2 * state["hessian"]).any()  # some are not clipped
    torch.testing.assert_close(p.detach().cpu().double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
    for name in ("exp_avg", "hessian"):
        found = optimizer.state[p][name].cpu().double()
        torch.testing.assert_close(found, torch.from_numpy(state[name]), rtol=1e-5, atol=1e-6)


def test_an_estimate_leaves_parameters_and_momenta(device: torch.device) -> None:
    p = Parameter(torch.ones(64, 64, device=device))
    optimizer = trained(p, gradients_for(p)[:1], state_dtype="int8", backend="eager")
    before, state = p.detach().clone(), optimizer.state_dict()["state"][0]
    p.grad = torch.full_like(p, float("inf"))
    optimizer.update_hessian()
    assert torch.equal(p, before)
    after = optimizer.state_dict()["state"][0]
    assert all(torch.equal(after["exp_avg"][n], v) for n, v in state["exp_avg"].items() if isinstance(v, torch.Tensor))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(p, before)


def test_an_estimate_by_hand(device: torch.device) -> None:
    """The estimate is 0.25 * 6^2 = 9, the mean 0.5 * 2 = 1: p = (1 - 0.1 * 0.1) * 1 - 0.1 * 1 / (0.1 * 2 * 9)."""
    p = Parameter(torch.ones(1, device=device))
    optimizer = triton_optim.SophiaG([p], **SETTINGS, backend="eager")
    p.grad = torch.full_like(p, 6.0)
    optimizer.update_hessian()
    p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert optimizer.state[p]["hessian"].item() == 9
    assert p.item() == pytest.approx(0.99 - 0.1 / 1.8)


def test_a_gradient_of_an_estimate_is_not_clipped(device: torch.device) -> None:
    p = Parameter(torch.ones(2, device=device))
    optimizer = triton_optim.SophiaG([p], **SETTINGS, max_grad_norm=1e-3, backend="eager")
    p.grad = torch.full_like(p, 2.0)
    optimizer.update_hessian()
    assert optimizer.state[p]["hessian"].tolist() == [1.0, 1.0]
    assert optimizer.max_grad_norm == 1e-3
