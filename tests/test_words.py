"""Whole powers and the words that are made of others, beside torch's, on every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter

from triton_optim import RuleOptimizer
from triton_optim.kernels.language import jit
from triton_optim.kernels.words import atan2, clamp, rsqrt
from triton_optim.spec import State


class Scalars(NamedTuple):
    lr: float


@jit
def words(p, g, angle, bounded, root, power, inverse, one, h):
    return p, atan2(g, p), clamp(g, -1.5, h.lr), rsqrt(p), g**5, p**-3, g**0


class Words(RuleOptimizer):
    rule = words
    states = tuple(map(State, ("angle", "bounded", "root", "power", "inverse", "one")))

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_words_are_torchs(backend: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    some = torch.tensor([0.0, 1.0, -1.0, 0.66, -0.66, 1e-30, 3e10, inf, -inf, nan, 2.5, -7.0], dtype=dtype)
    x = torch.cat([some.repeat_interleave(len(some)), torch.linspace(-4, 4, 1001, dtype=dtype)])
    y = torch.cat([some.repeat(len(some)), torch.linspace(3, -5, 1001, dtype=dtype)])
    p = Parameter(x.clone())
    p.grad = y.clone()
    optimizer = Words([p], {}, backend=backend)
    optimizer.step()
    state, close = optimizer.state[p], 4 * torch.finfo(dtype).eps
    exact = {
        "angle": torch.atan2(y, x),
        "bounded": y.clamp(-1.5, 2.0),
        "root": x.rsqrt(),
        "power": y**5,
        "inverse": x**-3,
        "one": torch.ones_like(y),
    }
    for name, expected in exact.items():
        torch.testing.assert_close(state[name], expected, rtol=close, atol=0, equal_nan=True, msg=name)
