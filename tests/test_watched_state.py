"""States are dicts that count their changes: a step sees every one, whoever makes it, and looks at none without."""

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from torch.nn import Parameter

import triton_optim
from triton_optim.buckets.state import WatchedState

ONES = torch.ones(5)


def stepped(device: torch.device, backend: str = "eager") -> tuple[Any, Parameter]:
    p = Parameter(torch.zeros(5, device=device))
    optimizer = triton_optim.SGD([p], lr=1.0, momentum=0.5, backend=backend)
    p.grad = torch.zeros(5, device=device)
    optimizer.step()
    return optimizer, p


CHANGES: dict[str, Any] = {
    "item": lambda state, new: state.__setitem__("momentum_buffer", new),
    "update": lambda state, new: state.update(momentum_buffer=new),
    "or": lambda state, new: state.__ior__({"momentum_buffer": new}),
    "pop": lambda state, new: (state.pop("momentum_buffer"), state.setdefault("momentum_buffer", new)),
    "del": lambda state, new: (state.__delitem__("momentum_buffer"), state.__setitem__("momentum_buffer", new)),
    "clear": lambda state, new: (state.clear(), state.update(momentum_buffer=new)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("own", [False, True], ids=["ours", "a user's dict"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values != ("compiled",)])
def test_a_state_that_was_replaced_is_used(change: str, own: bool, backend: str, device: torch.device) -> None:
    """Also by a backend that keeps where the states lie."""
    optimizer, p = stepped(device, backend)
    if own:
        optimizer.state[p] = dict(optimizer.state[p])
        optimizer.step()
    held = optimizer.state[p]  # as who keeps it from before
    for k in range(1, 3):
        CHANGES[change](held, k * ONES.to(device))
        p.detach().zero_()
        optimizer.step()
        assert torch.equal(p.detach(), -0.5 * k * ONES.to(device))
        optimizer.step()  # the same dict with the same values
        assert torch.equal(p.detach(), -0.75 * k * ONES.to(device))


def test_a_step_changes_no_state_that_it_counts(device: torch.device) -> None:
    optimizer, _ = stepped(device)
    before = WatchedState.changes
    for _ in range(3):
        optimizer.step()
    assert WatchedState.changes == before


def test_what_is_saved_or_copied_is_plain(device: torch.device) -> None:
    optimizer, p = stepped(device)
    assert type(optimizer.state[p]) is WatchedState
    assert [type(state) for state in optimizer.state_dict()["state"].values()] == [dict]
    assert type(pickle.loads(pickle.dumps(optimizer.state[p]))) is dict
    assert type(copy.deepcopy(optimizer.state[p])) is dict
    assert type(copy.copy(optimizer.state[p])) is dict
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())
    assert [type(state) for state in again.state.values()] == [WatchedState]
