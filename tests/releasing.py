"""Models whose gradients are released, and twins whose gradients are not."""

from typing import Any

import torch
from torch import Tensor

import triton_optim as to


class Model(torch.nn.Module):
    """Two layers that share a parameter, one that is not always used, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.third, self.never = torch.nn.Linear(6, 6), torch.nn.Linear(2, 2)

    def forward(self, x: Tensor, third: bool = True) -> Tensor:
        x = self.second(self.first(x).tanh()).tanh()
        return (self.third(x) if third else x).square().sum()


def model(device: Any, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(device, dtype)


def batch(step: int, own: Model) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1000 + step))
    return x.to(own.never.bias.device, own.never.bias.dtype)


def backward(own: Model, step: int) -> None:
    own(batch(step, own), third=step % 3 != 1).backward()


def pair(device: Any, cls: Any = to.SGD, dtype: torch.dtype = torch.float32, **options: Any) -> list[tuple[Model, Any]]:
    """A model and its optimizer, twice; the second's gradients are to be released."""
    found = []
    for _ in range(2):
        own = model(device, dtype)
        own_options = {"lr": 0.1, "backend": "eager"} | options
        found.append((own, cls(own.parameters(), **own_options)))
    return found


def train(pairs: list[tuple[Model, Any]], steps: Any, schedules: Any = ()) -> None:
    for step in steps:
        for own, opt in pairs:
            backward(own, step)
            if opt.engine.release is not None:
                assert all(p.grad is None for p in own.parameters())
            opt.step()
            opt.zero_grad()
        for schedule in schedules:
            schedule.step()
