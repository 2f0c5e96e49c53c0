"""Edits of groups and gradients between compiled steps, and within a compiled function: seen, or refused."""

from __future__ import annotations

from typing import Any

import edits
import pytest
import torch
from complaints import explains
from dynamo import UNDER_COMPILE
from edits import assert_as_torch, trained

import triton_optim

pytestmark = UNDER_COMPILE


def test_changed_set_of_gradients_recompiles_and_stays_right(device: torch.device) -> None:
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = triton_optim.SGD(params, lr=0.5, backend="eager")
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    params[0].grad = torch.ones(3, device=device)
    step()
    params[1].grad = torch.ones(3, device=device)
    step()
    assert params[0].tolist() == [0.0] * 3
    assert params[1].tolist() == [0.5] * 3


def test_parameter_groups_changed_after_compiling(device: torch.device) -> None:
    first, second = (torch.nn.Parameter(torch.ones(2, device=device)) for _ in range(2))
    optimizer = triton_optim.SGD([first], lr=1.0, backend="eager")
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    first.grad = torch.ones_like(first)
    step()
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    second.grad = torch.ones_like(second)
    step()
    assert first.tolist() == [-1.0] * 2
    assert second.tolist() == [0.5] * 2


SEEN = [
    edits.take_the_first,
    edits.append,
    edits.replace,
    edits.another_list,
    edits.take_the_last_group,
    edits.another_list_of_groups,
    edits.split_a_group,
    edits.list_one_twice,
]


@pytest.mark.parametrize("edit", SEEN, ids=lambda edit: edit.__name__)
def test_an_edit_of_the_groups_is_seen(edit: Any, device: torch.device) -> None:
    """Without an error where a group is gone, and without a graph break."""

    def compiled(opt: Any) -> Any:
        return torch.compile(opt.step, fullgraph=True, backend="eager")

    ours = trained(triton_optim.AdamW, edit, device, compiled, backend="eager")
    assert_as_torch(ours, trained(torch.optim.AdamW, edit, device, foreach=False))


def test_an_edit_within_the_compiled_function(device: torch.device) -> None:
    """Python's part of it is done after the graph has run: the step would be of other parameters."""
    params = [torch.nn.Parameter(torch.ones(2, device=device)) for _ in range(2)]
    optimizer = triton_optim.SGD(params, lr=1.0, backend="eager")

    def freeze_and_step() -> None:
        optimizer.param_groups[0]["params"].pop(0)
        optimizer.step()

    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="1 where its step was traced") as error:
        torch.compile(freeze_and_step, backend="aot_eager")()
    explains(error, "SGD has 2 parameters", "outside of the compiled function")
    assert torch.equal(params[0], torch.ones_like(params[0]))
