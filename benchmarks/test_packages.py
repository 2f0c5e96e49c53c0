"""How long is a step beside those of the packages that have what torch has not, on ResNet-50?"""

from collections.abc import Callable

import pytest
import torch

from triton_optim.bench.comparison import Case, compare
from triton_optim.bench.models import shapes
from triton_optim.bench.peers import PEERS, Unavailable, peer_class
from triton_optim.registry import rule_optimizers

PACKAGES = [name for name in PEERS if name.startswith(("pytorch_optimizer", "schedulefree", "prodigyopt", "heavyball"))]
MATRICES = ".optimizers.matrix."  # see test_matrix_step.py


def those_with(optimizer: str) -> list[str]:
    """The packages that have it, and those that are not installed."""
    found = []
    for name in PACKAGES:
        try:
            peer_class(PEERS[name], optimizer)
        except Unavailable as reason:
            if "not installed" not in str(reason):
                continue
        found.append(name)
    return found


@pytest.mark.parametrize("name", [cls.__name__ for cls in rule_optimizers().values() if MATRICES not in cls.__module__])
def test_packages(name: str, device: torch.device, benchmark: Callable, answer: Callable, patience: float) -> None:
    peers = those_with(name)
    if not peers:
        pytest.skip("no package has it")
    case = Case(rule_optimizers()[name.lower()], "resnet50", shapes("resnet50"), device=device)
    found = compare(case, peers, patience=patience, rounds=5)
    beside = found.beside()
    ratios, words = beside or ({}, "no package computes the same")
    ratio = ratios.get("ratio")
    target = None if ratio is None else 0.35
    text = f"{found.text}; {words}"
    answer(case.name, text, found.figures | ratios, value=ratio, target=target, measurement=found.measurement)
    benchmark.pedantic(found.contenders[0].step, rounds=3)
