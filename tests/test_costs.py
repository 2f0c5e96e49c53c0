"""What a step of every optimizer launches and has compiled is what the committed table says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import costs
import pytest
import torch
from conftest import TRITON_LOOPS
from launches import replace_launches
from table import CASES

import triton_optim
from triton_optim import compiled_backend, compiled_norm, symmetric_product

SHAPES = ((160, 160), (64, 64), (7,))  # for loops on all threads, for codes, and for neither
BF16 = torch.bfloat16
PRECISIONS = ("storage", "stochastic", "kahan", "split24", "split32", "master")
WHOLE = {"max_grad_norm": 1.0, "ema_decay": 0.9}


def every_step() -> dict[str, tuple[type, torch.dtype, dict[str, Any]]]:
    """An optimizer, the dtype of its parameters and its options, by name."""
    f32, adamw = torch.float32, triton_optim.AdamW
    steps: dict[str, Any] = {
        f"{case.name}, {name}": (case.ours, f32, options)
        for case in CASES
        if not case.sparse
        for name, options in case.variants.items()
    }
    for state in (None, f32, BF16, "int8", "int4"):
        for precision in PRECISIONS:
            options = {"param_precision": precision, "state_dtype": state}
            steps[f"AdamW, bfloat16 {precision}, states {state}"] = (adamw, BF16, options)
    steps["AdamW, float32, states int8"] = (adamw, f32, {"state_dtype": "int8"})
    steps["AdamW, clipped and averaged"] = (adamw, f32, WHOLE)
    steps["AdamW, clipped and averaged, bfloat16 int8"] = (adamw, BF16, WHOLE | {"state_dtype": "int8"})
    steps["AdamW, amp, clipped and averaged"] = (adamw, f32, WHOLE | {"amp": "fused"})
    steps["AdamW, capturable"] = (adamw, f32, {"capturable": True})
    steps["Muon, clipped and averaged"] = (triton_optim.Muon, f32, WHOLE)
    return steps


def kind(launcher: Any) -> str:
    """What a launch is compiled for: the kernel, types and constants."""
    return repr((launcher.kernel, launcher.types, launcher.constants))


def two_steps(backend: str, cls: type, dtype: torch.dtype, options: dict[str, Any], device: torch.device) -> Any:
    """Two steps, between which everything that a schedule may change does; gives what to do between them."""
    shapes = [shape for shape in SHAPES if cls is not triton_optim.Muon or len(shape) == 2]
    params = [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
    optimizer = cls(params, **options, backend=backend)
    if "amp" in options:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1, device=device), torch.zeros(1, device=device)
    for factor in (1.0, 0.5):
        for p in params:
            p.grad = torch.randn_like(p)
        for group in optimizer.param_groups:
            group |= {"lr": group["lr"] * factor}
        yield optimizer.step()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every launch, by what it is compiled for; none is made."""
    seen: list[str] = []
    replace_launches(monkeypatch, lambda launcher, *_: seen.append(kind(launcher)))
    monkeypatch.setattr(symmetric_product, "launch", lambda n, *given: seen.append(repr(given[-1])))
    return seen


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every graph that would be compiled, by its name; none is."""
    made: list[str] = []

    class Graph:
        def __init__(self, name: str, *_: Any) -> None:
            made.append(name)

        def __call__(self, *_: Any) -> None: ...

    for module in (compiled_backend, compiled_norm):
        monkeypatch.setattr(module, "Graph", Graph)
    return made


def forget_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((compiled_backend, "graph_for"), (compiled_backend, "codes_graph_for"),
                         (compiled_norm, "graph_for")):  # fmt: skip
        monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))


@pytest.mark.skipif(not TRITON_LOOPS, reason="no Triton, or an interpreter of it that NumPy broke")
def test_launches_are_costs_as_committed(launched: list[str], device: torch.device, write_costs: bool) -> None:
    found = {}
    for name, step in every_step().items():
        launched.clear()
        second = [len(launched) for _ in two_steps("triton", *step, device)]
        found[name] = {"launches": second[1] - second[0], "kernels": len(set(launched))}
    costs.compare("launches", found, write_costs)


def test_graphs_are_costs_as_committed(
    graphs: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch, write_costs: bool
) -> None:
    found = {}
    for name, step in every_step().items():
        graphs.clear()
        forget_graphs(monkeypatch)
        first, both = [len(graphs) for _ in two_steps("compiled", *step, device)]
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
