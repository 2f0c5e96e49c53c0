"""What a step of every optimizer has compiled is what the committed table says; what it launches: test_launch.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import costs
import pytest
import torch
from steps import every_step, two_steps

from triton_optim.backends.compiled import graph as compiled_graph
from triton_optim.backends.compiled import norm as compiled_norm


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every graph that would be compiled, by its name; none is."""
    made: list[str] = []

    class Graph:
        def __init__(self, name: str, *_: Any) -> None:
            made.append(name)

        def __call__(self, *_: Any) -> None: ...

    for module in (compiled_graph, compiled_norm):
        monkeypatch.setattr(module, "Graph", Graph)
    return made


def forget_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((compiled_graph, "graph_for"), (compiled_graph, "codes_graph_for"),
                         (compiled_norm, "graph_for")):  # fmt: skip
        monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))


def test_graphs_are_costs_as_committed(
    graphs: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch, write_costs: bool
) -> None:
    found = {}
    for name, step in every_step().items():
        graphs.clear()
        forget_graphs(monkeypatch)
        first, both = [len(graphs) for _ in two_steps("compiled", step, device)]
        found[name] = {"graphs": first, "more in the second step": both - first}
    costs.compare("graphs", found, write_costs)


def test_costs_that_changed_are_named(tmp_path: Path) -> None:
    old = {"adam, fp32": {"registers": 40, "spills": 0}, "lion, fp32": {"registers": 30}}
    costs.compare("kernels", old, True, "3.9.0", tmp_path)
    costs.compare("kernels", old, False, "3.9.0", tmp_path)
    new = {"adam, fp32": {"registers": 44, "spills": 0}, "sgd, fp32": {"registers": 20}}
    with pytest.raises(AssertionError) as raised:
        costs.compare("kernels", new, False, "3.9.0", tmp_path)
    _, advice, adam, lion, sgd = str(raised.value).splitlines()
    assert advice == costs.REWRITE
    assert adam == "adam, fp32: registers 40 -> 44"
    assert lion == "lion, fp32: gone"
    assert sgd == 'sgd, fp32: new, {"registers": 20}'


def test_costs_of_another_triton_are_not_compared(tmp_path: Path) -> None:
    costs.compare("kernels", {"adam": {"registers": 40}}, True, "3.9.0", tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"kernels\.json is of Triton 3\.9\.0, and 3\.10\.0 has"):
        costs.compare("kernels", {"adam": {"registers": 44}}, False, "3.10.0", tmp_path)
    assert len((tmp_path / "kernels.json").read_text().splitlines()) == 6
