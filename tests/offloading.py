"""What tests of offloaded steps train: a model of few parameters, and every kind of optimizer and option."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map

import triton_optim as to

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = [(160, 160), (64, 64), (7,), (4, 3, 5, 5)]
STEPS = 4


def made(dtype: torch.dtype = F32, device: Any = "cpu") -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]
    values[3] = values[3].contiguous(memory_format=torch.channels_last)
    return [Parameter(value.to(device)) for value in values]


def give(params: list[Parameter], step: int, missing: tuple[int, ...] = ()) -> None:
    random = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=random).to(p.dtype)
        p.grad = None if i in missing else g.to(p.device)


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def everything(opt: Any) -> list[Tensor]:
    """Parameters and all that is kept of them, on the CPU."""
    kept = [opt.state.get(p, {}) for p in params_of(opt)]
    states = [state[name] for state in kept for name in sorted(state) if isinstance(state[name], Tensor)]
    return [value.detach().cpu() for value in (*params_of(opt), *states)]


def train(opt: Any, steps: range) -> Any:
    for k in steps:
        give(params_of(opt), k, missing=(1,) if k == 2 else ())
        opt.step()
    return opt


def trained(cls: Any, params: list[Parameter], steps: int = STEPS, **options: Any) -> Any:
    return train(cls(params, **options), range(steps))


def resumed(device: torch.device, saved_where: str | None, **options: Any) -> list[list[Tensor]]:
    """What a training that was saved comes to, resumed beside the parameters and on the host.

    Args:
        saved_where: where it was offloaded to before.
        options: of the first.
    """
    kept = {"param_precision": "master", "state_dtype": F32, "ema_decay": 0.9}
    first = trained(to.AdamW, made(BF16, device), offload=saved_where, **kept, **options)
    saved = tree_map(lambda t: t.cpu().clone() if isinstance(t, Tensor) else t, first.state_dict())
    found = []
    for then in (None, "cpu"):
        opt = to.AdamW([Parameter(p.detach().clone()) for p in params_of(first)], offload=then, **kept)
        opt.load_state_dict(copy.deepcopy(saved))
        assert opt.param_groups[0].get("offload") == then
        assert opt.state[params_of(opt)[0]]["exp_avg"].device.type == ("cpu" if then else device.type)
        found.append(everything(train(opt, range(STEPS, 2 * STEPS))))
    return found


EVERYTHING = {"param_precision": "split24", "state_dtype": BF16, "ema_decay": 0.9, "ema_dtype": BF16}
CASES: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "AdamW": (to.AdamW, F32, {}),
    "SGD": (to.SGD, F32, {"lr": 0.1, "momentum": 0.9}),
    "Lion": (to.Lion, F32, {}),
    "float64": (to.AdamW, torch.float64, {}),
    "complex": (to.AdamW, torch.complex64, {"backend": "auto"}),
    "states float32": (to.AdamW, BF16, {"state_dtype": F32, "lr": 0.1}),
    "int8": (to.AdamW, F32, {"state_dtype": "int8"}),
    "int4": (to.AdamW, BF16, {"state_dtype": "int4", "param_precision": "stochastic"}),
    "master": (to.AdamW, BF16, {"param_precision": "master", "state_dtype": F32, "ema_decay": 0.9}),
    "kahan": (to.Lion, BF16, {"param_precision": "kahan"}),
    "averages": (to.AdamW, F32, {"ema_decay": 0.9}),
    "clipped": (to.AdamW, F32, {"max_grad_norm": 1.0}),
    "everything": (to.AdamW, BF16, EVERYTHING | {"max_grad_norm": 1.0}),
    "maximize": (to.SGD, F32, {"lr": 0.1, "maximize": True}),
    "measured": (to.LAMB, BF16, {"lr": 0.1, "max_grad_norm": 1.0}),
    "of the whole model": (to.Prodigy, F32, {}),
    "before the rule": (to.Adafactor, F32, {"lr": 0.1}),
    "made before": (to.Adagrad, F32, {"lr": 0.1}),
    "eager": (to.AdamW, F32, {"backend": "eager"}),
}
each = pytest.mark.parametrize(("cls", "dtype", "options"), CASES.values(), ids=CASES)
