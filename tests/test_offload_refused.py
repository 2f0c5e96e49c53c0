"""What offloaded steps exclude is refused, and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from complaints import Unchanged, explains
from conftest import CPP
from offloading import give, made, trained
from torch.nn import Parameter

import triton_optim as to

pytestmark = CPP


def test_states_where_steps_are_captured_stay() -> None:
    opt = trained(to.AdamW, made())
    opt.engine._captured.append(opt.engine.plan)
    with pytest.raises(RuntimeError) as error:
        opt.offload_states()
    explains(error, "offload_states() after a step was captured")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"offload": "disk"}, ValueError, "Invalid offload: 'disk'"),
    "capturable": ({"capturable": True}, RuntimeError, "a step on the host can't be capturable"),
    "differentiable": ({"differentiable": True}, RuntimeError, "a step on the host can't be differentiable"),
    "Triton": ({"backend": "triton"}, RuntimeError, 'backend="triton" runs no step on the host'),
}


@pytest.mark.parametrize(("options", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_excludes_it_is_refused(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        to.AdamW(made(), **({"offload": "cpu"} | options))
    explains(error, words)


def test_sparse_gradients_and_shared_memory_are_refused() -> None:
    memory = torch.zeros(8)
    tied = [Parameter(memory[:6]), Parameter(memory[2:])]
    opt = to.SGD(tied, lr=0.1, offload="cpu")
    give(tied, 0)
    with Unchanged(opt), pytest.raises(RuntimeError) as error:
        opt.step()
    explains(error, "parameter 0 shares memory with another")
    p = Parameter(torch.zeros(4, 2))
    opt = to.SGD([p], lr=0.1, offload="cpu")
    p.grad = torch.ones(4, 2).to_sparse()
    with Unchanged(opt), pytest.raises(RuntimeError) as error:
        opt.step()
    explains(error, "the gradient of parameter 0 is sparse")


def test_a_step_that_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = made()
    opt = to.AdamW(params, offload="cpu")
    give(params, 0)
    monkeypatch.setattr("triton_optim.engine.engine.capturing", lambda device: True)
    with Unchanged(opt), pytest.raises(RuntimeError) as error:
        opt.step()
    explains(error, "a captured step cannot run on the host")
