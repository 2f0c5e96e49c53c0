"""What a step notes of the hyperparameters: whatever a user does to a group counts in the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import triton_optim
from triton_optim.hyperparameters import GroupValues

START: dict[str, Any] = {"params": [], "lr": 0.1, "betas": (0.9, 0.99), "nesterov": False, "mode": "a"}


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        (lambda g: g.update(lr=0.2), False),
        (lambda g: g.update(betas=(0.8, 0.99)), False),
        (lambda g: g.update(lr=1), True),  # another type
        (lambda g: g.update(betas=(0.9, 0.99, 0.9)), True),
        (lambda g: g.update(nesterov=True), True),
        (lambda g: g.update(mode="b"), True),
        (lambda g: g.update(new=1.0), True),
        (lambda g: g.update(decay=g.pop("lr")), True),  # the same object under another name
    ],
)
def test_what_changed_is_read_anew(change: Callable[[dict[str, Any]], None], rebuilt: bool) -> None:
    group, values = dict(START), GroupValues()
    values.read(group)
    before = values.changes, values.rebuilt
    values.read(group)
    assert (values.changes, values.rebuilt) == before
    change(group)
    values.read(group)
    assert values.changes > before[0]
    assert (values.rebuilt > before[1]) == rebuilt
    assert values.plain == {name: value for name, value in group.items() if name != "params"}


def test_what_changes_in_place_is_read_in_every_step() -> None:
    group, values = START | {"betas": [0.9, 0.99], "lr": torch.tensor(0.1)}, GroupValues()
    values.read(group)
    group["betas"][0] = 0.5
    group["lr"].fill_(0.3)
    values.read(group)
    assert values.plain["betas"] == [0.5, 0.99]
    assert values.plain["lr"] == torch.tensor(0.3).item()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_takes_what_was_changed_in_place(backend: str, capturable: bool, device: torch.device) -> None:
    p = Parameter(torch.zeros(4, device=device))
    p.grad = torch.ones_like(p)
    rate = torch.tensor(0.5, device=device if capturable else "cpu")
    optimizer = triton_optim.SGD([p], lr=rate, capturable=capturable, backend=backend)
    optimizer.step()
    rate.fill_(0.25)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    optimizer.param_groups[0]["maximize"] = True
    optimizer.step()
    assert p.tolist() == [-0.75] * 4


@pytest.mark.parametrize("capturable", [False, True])
def test_an_optimizers_own_number_counts(backend: str, capturable: bool, device: torch.device) -> None:
    class Halved(triton_optim.SGD):
        share = 1.0

        def scalars(self, group: dict[str, Any], step: Any) -> Any:
            h = super().scalars(group, step)
            return h._replace(lr=h.lr * self.share)

    p = Parameter(torch.zeros(4, device=device))
    p.grad = torch.ones_like(p)
    optimizer = Halved([p], lr=1.0, capturable=capturable, backend=backend)
    for share in (1.0, 1.0, 0.5, 0.25):
        optimizer.share = share
        optimizer.step()
    assert p.tolist() == [-2.75] * 4


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_takes_what_was_loaded(backend: str, capturable: bool, device: torch.device) -> None:
    p = Parameter(torch.zeros(4, device=device))
    p.grad = torch.ones_like(p)
    optimizer = triton_optim.SGD([p], lr=1.0, capturable=capturable, backend=backend)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert p.tolist() == [-1.5] * 4
