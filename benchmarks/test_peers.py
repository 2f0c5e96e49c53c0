"""How long is a step beside every other package's, on ResNet-50?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import triton_optim
from triton_optim.bench.comparison import Case, compare
from triton_optim.bench.models import shapes
from triton_optim.bench.peers import PEERS

CODED = [name for name, peer in PEERS.items() if peer.share is not None]
PLAIN = [name for name in PEERS if name not in CODED]
# What the states are kept in, and who keeps them so.
STATES = {"fp32 states": ({}, PLAIN), "int8 states": ({"state_dtype": "int8"}, CODED)}


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGD"])
def test_peers(
    name: str, states: str, device: torch.device, benchmark: Callable, answer: Callable, patience: float
) -> None:
    options: dict[str, Any]
    options, peers = STATES[states]
    case = Case(getattr(triton_optim, name), "resnet50", shapes("resnet50"), device=device, options=options)
    found = compare(case, peers, patience=patience, rounds=5)
    beside = found.beside()
    ratios, words = beside or ({}, "no peer has it")
    text = f"{found.text}; {words}"
    answer(case.name, text, found.figures | ratios, measurement=found.measurement)
    benchmark.pedantic(found.contenders[0].step, rounds=3)
