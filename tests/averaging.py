"""What tests of averages of the weights train, and what they compare of it."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim as to

BF16 = torch.bfloat16
ALWAYS, LATE, SOMETIMES, EMPTY, NEVER, FROZEN = range(6)
SHAPES = [(9, 5), (4, 3), (3, 7), (0, 2), (2, 2), (4, 4)]


def model(device: Any, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> torch.nn.ParameterList:
    random = torch.Generator().manual_seed(0)
    params = torch.nn.ParameterList(Parameter(torch.randn(s, generator=random).to(device, dtype)) for s in shapes)
    if len(params) > FROZEN:
        params[FROZEN].requires_grad_(False)
    return params


def give(params: Any, step: int) -> None:
    random = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=random).to(p.device, p.dtype)
        here = {LATE: step >= 5, SOMETIMES: step % 3 == 0, NEVER: False, FROZEN: False}.get(i, True)
        p.grad = g if here else None


def train(params: Any, opt: Any, steps: Any) -> None:
    for step in steps:
        give(params, step)
        opt.step()


def bits(opt: Any) -> Any:
    params = [p for group in opt.param_groups for p in group["params"]]
    return copy.deepcopy(([p.detach() for p in params], [dict(opt.state.get(p, {})) for p in params]))


def averaged(opt: Any) -> list[Tensor]:
    with opt.averaged_parameters():
        return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


def small(device: Any, backend: str = "eager", dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Two parameters after three steps."""
    params = model(device, dtype, SHAPES[:2])
    opt = to.AdamW(params, lr=0.01, **({"ema_decay": 0.9} | options), backend=backend)
    train(params, opt, range(4, 7))
    return params, opt
