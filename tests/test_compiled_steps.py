"""Steps as Triton compiles them for sm_90, executed by a machine for its code, beside eager ones.

Without contraction to fused multiply-adds, and with the nearest number for each approximate result, a compiled step is
the eager one bit for bit: the tolerance is zero, so that a wrong mask, offset, rounding or random bit cannot hide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiled_steps import BF16, CODED_NUMELS, F16, F32, F64, KEPT, Training, differing, errors, executing, unfused
from ptx_machine.executor import Executor
from table import CASES, Case

import triton_optim

pytestmark = pytest.mark.compiled
ELEMENTWISE = [case for case in CASES if case.elementwise and not case.sparse]
EVERY_RULE = [(case, name) for case in ELEMENTWISE for name in case.variants]
every_rule = pytest.mark.parametrize(("case", "variant"), EVERY_RULE, ids=[f"{c.name}-{v}" for c, v in EVERY_RULE])


@pytest.fixture
def machine() -> Iterator[Executor]:
    """Executes the launches of a test, none of which may be faulty."""
    with executing() as executor:
        yield executor
    assert executor.launches
    assert not executor.faults


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@every_rule
def test_every_rule(case: Case, variant: str, dtype: torch.dtype, machine: Executor) -> None:
    # RAdam divides by a root from its sixth step on.
    training = Training(case.ours, case.variants[variant], dtype, steps=6 if case.name == "RAdam" else 2)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())


@pytest.mark.parametrize("kept", KEPT)
def test_every_codec(kept: str, machine: Executor) -> None:
    dtype, options = KEPT[kept]
    training = Training(triton_optim.AdamW, {"amsgrad": True} | options, dtype, CODED_NUMELS)
    with unfused():
        assert not differing(training.run("triton"), training.eagerly())
