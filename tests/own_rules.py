"""An optimizer of any rule, and what its steps come to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CPP, TRITON_LOOPS
from torch.nn import Parameter

from triton_optim import RuleOptimizer
from triton_optim.spec import State

F32, F64 = torch.float32, torch.float64
NO_TRITON = pytest.mark.skipif(not TRITON_LOOPS, reason="no Triton, or an interpreter of it that NumPy broke")
BACKENDS = ["eager", pytest.param("cpp", marks=CPP), pytest.param("triton", marks=NO_TRITON)]


class Scalars(NamedTuple):
    lr: float
    a: float


class Own(RuleOptimizer):
    """An optimizer from whatever rule a test brings."""

    states = (State("m"),)

    def __init__(self, params: Any, lr: float = 0.1, a: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "a": a}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], group["a"])


def optimizer_of(a_rule: Any) -> type[RuleOptimizer]:
    return type("Own", (Own,), {"rule": a_rule})


P, G, M = [0.5, -0.7, 0.3, 2.0], [0.02, -0.25, 3.1, 0.0], [0.0, 1.0, -1.0, 0.05]


def stepped(rule: Any, backend: str, dtype: torch.dtype = F64, **options: Any) -> tuple[list[float], list[float]]:
    """The parameter and the state after a step from P, G and M."""
    p = Parameter(torch.tensor(P, dtype=dtype))
    optimizer = optimizer_of(rule)([p], backend=backend, **options)
    optimizer.state[p]["m"] = torch.tensor(M, dtype=dtype)
    p.grad = torch.tensor(G, dtype=dtype)
    optimizer.step()
    return p.tolist(), optimizer.state[p]["m"].tolist()


FACTOR = 0.3


@pytest.fixture
def defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """Makes a rule of lines, in a file."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made: list[str] = []

    def define(lines: str, **more: Any) -> tuple[Any, Path]:
        name = f"rule_of_a_test_{len(made)}"
        path = tmp_path / f"{name}.py"
        names = "FACTOR, LIMITS, abs, exp, helper, helper_with_a_fault, log, maximum, minimum, not_decorated"
        path.write_text(
            f"import torch\nfrom test_rules import {names}\n"
            "from test_rules import calls_itself, jit, returns_nothing, sign, sqrt, tl, where\n\n"
            f"@jit\ndef rule(p, g, m, h):\n    {lines}\n    return p - h.lr * g, m\n"
        )
        made.append(name)
        sys.modules.pop(name, None)
        return importlib.import_module(name).rule, path

    yield define
    for name in made:
        sys.modules.pop(name, None)
