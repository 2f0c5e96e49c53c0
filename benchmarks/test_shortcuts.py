"""What do the parts save that are there for speed alone? Where that is less than a tenth, they can go.

The compiled backend calls the code that Inductor made past Dynamo's guards, and has it written with words of its own
(vector_code.py); Triton steps whose numbers are on the device record what `scalars` does, and do it in one launch
(recording.py, rows.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import triton_optim
from triton_optim.backends.compiled import graph
from triton_optim.backends.triton import rows
from triton_optim.bench.agreement import Contender, assert_agree
from triton_optim.bench.measure import Side, measure
from triton_optim.bench.models import parameters, shapes
from triton_optim.util import gather

WORTH = 1 / 1.1
ROUNDED = {"param_precision": "stochastic", "state_dtype": torch.bfloat16}
# Many calls show what guards cost, stochastic rounding what the words do; large float32 tensors show neither.
COMPILED: list[tuple[str, torch.dtype, dict[str, Any], float | None]] = [
    ("1000x1k", torch.float32, {}, WORTH),
    ("64M16", torch.float32, {}, None),
    ("64M16", torch.bfloat16, ROUNDED, WORTH),
]


class Plain(graph.Graph):
    """As torch.compile leaves it."""

    def __init__(
        self,
        name: str,
        body: graph.Body,
        slot: list[tuple[torch.dtype, tuple[int, ...]]],
        key: bool,
        row: Tensor,
        example: int,
        parallel: bool,
    ) -> None:
        roles = self.roles = len(slot) + key

        def call(row: Tensor, *tensors: Tensor) -> None:
            for start in range(0, len(tensors), roles):
                body(list(tensors[start : start + roles]), row)

        options: dict[str, Any] = {} if parallel else {"cpp.threads": 1}
        self._compiled = torch.compile(call, fullgraph=True, dynamic=True, options=options)

    def __call__(self, row: Tensor, tensors: list[Tensor]) -> None:
        step = graph.SLOTS * self.roles
        for start in range(0, len(tensors), step):
            self._compiled(row, *tensors[start : start + step])


@contextmanager
def plainly_compiled() -> Iterator[None]:
    """What is compiled within it is as torch.compile leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "Graph", Plain)
        patch.setattr(graph, "rounded", lambda value: value)  # which Inductor's own words do
        graph.graph_for.cache_clear()
        yield
    graph.graph_for.cache_clear()


def compiled(name: str, model: str, dtype: torch.dtype, options: dict[str, Any]) -> Contender:
    params = list(parameters(shapes(model), dtype=dtype))
    optimizer = triton_optim.AdamW(params, lr=0.1, weight_decay=0.1, backend="compiled", **options)
    optimizer.step()  # in which it is compiled
    return Contender(name, optimizer, params, optimizer.step)


@pytest.mark.parametrize(
    ("model", "dtype", "options", "target"), COMPILED, ids=["1000x1k", "64M16", "64M16-stochastic"]
)
def test_compiled(
    model: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    target: float | None,
    benchmark: Callable,
    answer: Callable,
    patience: float,
) -> None:
    case = (model, dtype, options)
    contenders = [compiled("ours", *case)]
    with plainly_compiled():
        contenders.append(compiled("plain torch.compile", *case))
    assert_agree(contenders)
    m = measure([Side(c.name, c.step) for c in contenders], patience, rounds=5)
    ratios, words = m.compared("ours", ["plain torch.compile"])
    kind = "stochastic rounding" if options else "float32"
    answer(f"the compiled backend, AdamW, {model}, {kind}", words, ratios, value=ratios["ratio"], target=target,
           measurement=m)  # fmt: skip
    benchmark.pedantic(contenders[0].step, rounds=3)


class Operations(TorchDispatchMode):
    """Counts torch's operations, each of which is a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam", "SGD"])
def test_recorded_scalars(
    name: str, triton_device: torch.device, benchmark: Callable, answer: Callable, patience: float
) -> None:
    """The host time of a step of 10 tensors whose numbers are on the device: the scalars in one launch, or in torch
    operations on 0-dim tensors.
    """
    gather.library.load()

    def step_of(recorded: bool) -> Callable[[], None]:
        params = list(parameters(shapes("10x1"), triton_device))
        optimizer = getattr(triton_optim, name)(params, lr=0.1, capturable=True, backend="triton")

        def step() -> None:
            with pytest.MonkeyPatch.context() as patch:
                if not recorded:
                    patch.setattr(rows.TritonRows, "rows", lambda *_: None)
                optimizer.step()

        for _ in range(3):
            step()
        return step

    steps = {"recorded": step_of(True), "operations": step_of(False)}
    m = measure([Side(*side) for side in steps.items()], patience, rounds=5, turn=20)
    counts = {}
    for kind, step in steps.items():
        with Operations() as seen:
            step()
        counts[kind] = seen.count
    ratios, words = m.compared("recorded", ["operations"])
    text = f"{words}, {counts['recorded']} operations of torch's for {counts['operations']}"
    answer(f"scalars on the device, {name}", text, ratios | counts, value=ratios["ratio"], target=WORTH, measurement=m)
    benchmark.pedantic(steps["recorded"], rounds=10)
