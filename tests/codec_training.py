"""Training with every codec, and what is compared of it."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from table import CASES
from torch import Tensor
from torch.nn import Parameter

import triton_optim

BF16 = torch.bfloat16
# Parameter dtype and options: one of each codec, and what people combine.
KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "int4": (torch.float32, {"state_dtype": "int4"}),
    "double int8": (torch.float64, {"state_dtype": "int8"}),
    "stochastic int8": (BF16, {"state_dtype": "int8", "param_precision": "stochastic"}),
    "half stochastic int4": (torch.float16, {"state_dtype": "int4", "param_precision": "stochastic"}),
    "kahan": (BF16, {"param_precision": "kahan"}),
    "split24": (BF16, {"param_precision": "split24"}),
    "split32": (BF16, {"param_precision": "split32", "state_dtype": torch.float32}),
    "split32 int8": (BF16, {"param_precision": "split32", "state_dtype": "int8"}),
    "master": (BF16, {"param_precision": "master", "state_dtype": BF16}),
    "half kahan": (torch.float16, {"param_precision": "kahan"}),
    "half split24": (torch.float16, {"param_precision": "split24"}),
    "half split32": (torch.float16, {"param_precision": "split32"}),
    "half master": (torch.float16, {"param_precision": "master"}),
}
# With a block that is not full, an item of int4 that is half empty, and one too small for codes.
SHAPES = [(64, 80), (4099,), (37, 5)]
RULES = [case for case in CASES if case.elementwise and not case.sparse]
ADAMW = next(case for case in CASES if case.name == "AdamW")
kept = pytest.mark.parametrize("name", KEPT)
# Graphs of a codec take 5 to 15 seconds to compile: these are made of all the parts that there are.
COMPILED = (
    "int4",
    "stochastic int8",
    "half stochastic int4",
    "kahan",
    "split24",
    "half split24",
    "split32 int8",
    "master",
)
kept_on_backends = pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, *backend.values, marks=backend.marks, id=f"{backend.values[0]}-{name}")
        for backend in BACKENDS
        for name in KEPT
        if backend.values[0] != "compiled" or name in COMPILED
    ],
)


def trained(
    cls: Any, name: str, backend: str, device: torch.device, **options: Any
) -> tuple[list[Parameter], triton_optim.RuleOptimizer]:
    """Three steps, which are made once: the tests have copies."""
    return copy.deepcopy(trained_once(cls, name, backend, device, tuple(options.items())))


@cache
def trained_once(
    cls: Any, name: str, backend: str, device: torch.device, options: tuple[tuple[str, Any], ...]
) -> tuple[list[Parameter], triton_optim.RuleOptimizer]:
    dtype, precision = KEPT[name]
    random = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in SHAPES]
    optimizer = cls(params, **(precision | dict(options)), backend=backend)
    go_on(params, optimizer, range(3))
    return params, optimizer


def go_on(params: list[Parameter], optimizer: Any, steps: range) -> None:
    for k in steps:
        random = torch.Generator().manual_seed(1 + k)
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(p.device, p.dtype)
        optimizer.step()


def everything(params: list[Parameter], optimizer: triton_optim.RuleOptimizer) -> list[Tensor]:
    return [p.detach().clone() for p in params] + [
        torch.as_tensor(value).clone() for p in params for _, value in sorted(optimizer.state[p].items())
    ]
