"""Learning rates by width: factors by hand, and steps that move a network alike at any width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triton_optim
from triton_optim import mup_param_groups


class Net(nn.Module):
    def __init__(self, width: int, device: str = "cpu") -> None:
        super().__init__()
        on: Any = {"device": device}
        self.table = nn.Embedding(11, width, **on)
        self.hidden = nn.Linear(width, 4 * width, **on)
        self.back = nn.Linear(4 * width, width, bias=False, **on)
        self.norm = nn.LayerNorm(width, **on)
        self.head = nn.Linear(width, 11, bias=False, **on)
        self.few = nn.Linear(3, 3, **on)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.head(self.norm(x + self.back(self.hidden(x).relu())))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("adam", {"table": 1, "hidden": 1 / 8, "bias": 1, "back": 1 / 8, "norm": 1, "head": 1 / 8, "few": 1}),
        ("sgd", {"table": 8, "hidden": 1, "bias": 8, "back": 1, "norm": 8, "head": 1 / 8, "few": 1}),
    ],
)
def test_factors_by_hand(kind: Any, expected: dict[str, float]) -> None:
    model = Net(64)
    groups = mup_param_groups(model, Net(8, "meta"), lr=0.5, weight_decay=0.25, kind=kind)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len([*model.parameters()])
    own = {
        "table": model.table.weight,
        "hidden": model.hidden.weight,
        "bias": model.hidden.bias,
        "back": model.back.weight,
        "norm": model.norm.weight,
        "head": model.head.weight,
        "few": model.few.weight,
    }
    assert {name: found[id(p)]["lr"] / 0.5 for name, p in own.items()} == expected
    assert all(group["lr"] * group["weight_decay"] == 0.5 * 0.25 for group in groups)


def test_what_is_tied_is_an_embedding_and_what_is_frozen_is_left_out() -> None:
    model, base = Net(64), Net(8, "meta")
    model.head.weight = model.table.weight
    base.head.weight = base.table.weight
    model.norm.requires_grad_(False)
    groups = mup_param_groups(model, base, lr=1.0)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.table.weight)] == 1.0
    assert id(model.norm.weight) not in rate
    assert all("weight_decay" not in group for group in groups)


def test_convolutions_go_by_their_channels() -> None:
    wide, narrow = nn.Conv2d(32, 64, 3), nn.Conv2d(8, 32, 3, device="meta")
    (weight, bias) = mup_param_groups(wide, narrow, lr=1.0, kind="sgd")
    assert weight["lr"] == (64 / 32) / (32 / 8)
    assert bias["lr"] == 2.0


@pytest.mark.parametrize(
    ("base", "kind", "says"),
    [
        (lambda: Net(8), "lion", 'Invalid kind: \'lion\'. Use "adam" or "sgd".'),
        (lambda: nn.Linear(8, 8), "adam", "table.weight has shape .11, 64., and base has no such parameter. Give"),
    ],
)
def test_errors(base: Any, kind: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mup_param_groups(Net(64), base(), lr=1.0, kind=kind)


def moved(width: int, groups: Any) -> float:
    """By how much the outputs move in a step of Adam: the root of their mean square."""
    torch.manual_seed(0)
    model, x, y = Net(width), torch.arange(11), torch.arange(11).roll(1)
    with torch.no_grad():
        model.head.weight.zero_()
    optimizer = triton_optim.Adam(groups(model), lr=0.01, backend="eager")
    for _ in range(2):  # the first moves the head alone, whose gradient is not 0
        before = model(x).detach()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (model(x) - before).square().mean().sqrt().item()


def test_a_step_moves_a_network_alike_at_any_width() -> None:
    by_width = [moved(width, lambda model: mup_param_groups(model, Net(32, "meta"), lr=0.01)) for width in (32, 512)]
    plain = [moved(width, lambda model: model.parameters()) for width in (32, 512)]
    assert 0.5 < by_width[1] / by_width[0] < 2
    assert plain[1] / plain[0] > 5
