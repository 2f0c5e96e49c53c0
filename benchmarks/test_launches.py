"""How many kernels does a step launch?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import triton_optim
from triton_optim.backends.triton.launch import Launcher
from triton_optim.bench.models import parameters, shapes


def misaligned(p: torch.nn.Parameter) -> torch.nn.Parameter:
    """A copy one element further than a 16-byte boundary."""
    view = torch.empty(p.numel() + 1, device=p.device)[1:].view(p.shape)
    moved = torch.nn.Parameter(view.copy_(p.detach()))
    assert moved.data_ptr() % 16 == 4
    moved.grad = p.grad
    return moved


@pytest.mark.parametrize(("misplaced", "target"), [(0, 1), (1, 2)], ids=["aligned", "one misaligned tensor"])
def test_launches(
    misplaced: int, target: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, answer: Callable
) -> None:
    params = list(parameters(shapes("resnet50"), triton_device))
    params[:misplaced] = map(misaligned, params[:misplaced])
    decayed, others = [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 1e-4}]
    optimizer = triton_optim.AdamW(groups, backend="triton")

    launches: list[int] = []

    def count(launcher: Launcher, programs: int, *arguments: Any) -> None:
        launches.append(programs)
        launch(launcher, programs, *arguments)

    launch = Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", count)
    optimizer.step()
    first = len(launches)
    launches.clear()
    optimizer.step()
    assert first == len(launches) == sum(bucket.launches for bucket in triton_optim.explain(optimizer))
    case = f"AdamW, resnet50 (161 tensors), 2 groups, {misplaced} misaligned"
    text = f"{len(launches)} launches a step, of {launches} programs"
    answer(case, text, {"launches": len(launches), "programs": launches}, value=len(launches), target=target)
    assert len(launches) == target
