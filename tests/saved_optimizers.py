"""Optimizers that were trained, saved and loaded, for tests of what is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim as to

BF16 = torch.bfloat16


def give(params: list[Parameter], step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(p.device, p.dtype)


def train(params: list[Parameter], opt: Any, steps: range) -> None:
    for step in steps:
        give(params, step)
        opt.step()


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Any = "cpu") -> list[Parameter]:
    random = torch.Generator().manual_seed(9)
    return [Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in shapes]


def trained(cls: Any, shape: tuple[int, ...] = (4096,), **options: Any) -> tuple[list[Parameter], Any]:
    params = parameters(shape)
    opt = cls(params, **({"backend": "eager"} | options))
    train(params, opt, range(3))
    return params, opt


def twin(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def moments(opt: Any) -> dict[str, Tensor]:
    return to.to_torch_state_dict(opt)["state"][0]
