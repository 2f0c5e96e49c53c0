"""What optimizers make of a learning rate that changes, and schedules that they have inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table import CASES
from torch.nn import Parameter

import triton_optim

BY_NAME = {case.name: case for case in CASES}
BETAS = (0.8, 0.9, 0.99)
OPTIONS: dict[str, dict[str, Any]] = {
    "LaProp": {"betas": BETAS[:2]},
    "AdamC": {"betas": BETAS[:2], "max_lr": 0.05},
    "ADOPT": {"betas": BETAS[:2]},
    "Adan": {"betas": BETAS},
    "AdEMAMix": {"betas": BETAS, "beta3_warmup": 5, "alpha_warmup": 3},
    "SimplifiedAdEMAMix": {"betas": BETAS[:2], "min_beta1": 0.5, "beta1_warmup": 5, "bias_correction1": True},
}


def rate(step: int) -> float:
    return 0.05 * (step + 1) / 4 if step < 4 else 0.05 / step


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_learning_rate_that_changes(name: str, capturable: bool, backend: str, device: torch.device) -> None:
    if backend == "compiled":
        pytest.skip("it is given the scalars that eager is")
    case, options = BY_NAME[name], {"weight_decay": 0.1, **OPTIONS[name]}
    random = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, generator=random)
    gradients = [torch.randn(4, 3, generator=random) for _ in range(8)]
    p = Parameter(start.clone().to(device))
    optimizer = case.ours([p], **options, capturable=capturable, backend=backend)
    for step, g in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = rate(step)
        p.grad = g.to(device)
        optimizer.step()
    (wanted,), _ = case.reference([start.numpy()], [[g.numpy()] for g in gradients], lr=rate, **options)
    torch.testing.assert_close(p.detach().cpu().double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.9), (0.5, 0.0), (0.0, 0.0)])
def test_a_warm_up_from_or_to_no_mean_at_all(start: float, end: float, backend: str, device: torch.device) -> None:
    """Of a beta of 0 the half-life is 0; so is that between two of these."""
    if backend == "compiled":
        pytest.skip("it is given the scalars that eager is")
    for capturable in (False, True):
        p = Parameter(torch.zeros(1, device=device))
        options: dict[str, Any] = {"betas": (start, 0.5, end), "beta3_warmup": 2, "capturable": capturable}
        optimizer = triton_optim.AdEMAMix([p], **options, backend=backend)
        p.grad = torch.ones_like(p)
        optimizer.step()
        # 1 / ln(beta) is the mean of the ends', of which that of 0 is 0.
        beta = 0.9**2 if end == 0.9 else 0.5**2 if start else 0.0
        assert optimizer.state[p]["exp_avg_slow"].item() == pytest.approx(1 - beta)


def test_the_largest_learning_rate_of_adamc() -> None:
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:2], "lr": 0.5}]
    optimizer = triton_optim.AdamC(groups, lr=0.25)
    optimizer.add_param_group({"params": params[2:], "max_lr": 2.0})
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.25, 0.5, 2.0]
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4.0, total_steps=10, cycle_momentum=False)
    assert [group["max_lr"] for group in optimizer.param_groups] == [4.0] * 3


def test_adamc_goes_on_from_adamw() -> None:
    first = triton_optim.AdamW([p := Parameter(torch.ones(2))], lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(first, lambda step: 0.5)
    p.grad = torch.ones(2)
    first.step()
    optimizer = triton_optim.AdamC([p], lr=0.1)
    optimizer.load_state_dict(first.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["max_lr"]) == (0.25, 0.5)
    optimizer.step()


def test_adamc_has_to_know_the_largest() -> None:
    with pytest.raises(ValueError, match=r"Invalid max_lr: None, with lr=0\.0\. .* Give the largest"):
        triton_optim.AdamC([Parameter(torch.ones(2))], lr=0.0)
