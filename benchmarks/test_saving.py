"""How long do ``state_dict``, ``load_state_dict``, the constructor and ``add_param_group`` take, beside torch's?

All of it is Python's time for each parameter, so the parameters are small. One step was made, on a CPU, in one process.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import triton_optim
from triton_optim.bench.measure import Side, measure

COUNTS = (400, 4_000, 40_000)
MADE = 10_000
TARGET_SAVED, TARGET_MADE = 1.2, 1.5  # times torch's
OURS, TORCH = "ours", "torch"
OPTIMIZERS: dict[str, dict[str, Any]] = {"AdamW": {}, "SGD": {"lr": 0.1, "momentum": 0.9}}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def parameters(count: int) -> list[Parameter]:
    return [Parameter(torch.zeros(4)) for _ in range(count)]


def stepped(name: str, count: int) -> tuple[Optimizer, Optimizer]:
    """Each of its own parameters, with the states of a step."""
    found = []
    for package in (triton_optim, torch.optim):
        params = parameters(count)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = getattr(package, name)(params, **OPTIMIZERS[name])
        optimizer.step()
        optimizer.zero_grad()
        found.append(optimizer)
    return found[0], found[1]


def assert_alike(saved: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise where two state dicts differ."""
    assert list(saved["state"]) == list(theirs["state"])
    assert [group["params"] for group in saved["param_groups"]] == [group["params"] for group in theirs["param_groups"]]
    for state, other in zip(saved["state"].values(), theirs["state"].values(), strict=True):
        assert state.keys() == other.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, other[key])


def ask(
    answer: Callable,
    benchmark: Callable,
    case: str,
    runs: tuple[Callable[[], Any], Callable[[], Any]],
    count: int,
    target: float,
    patience: float,
    **how: Any,
) -> None:
    """Time ours beside torch's, and answer."""
    m = measure([Side(OURS, runs[0]), Side(TORCH, runs[1])], patience, **how)
    ratios, words = m.compared(OURS, [TORCH])
    each = {f"{name} us a parameter": 1e6 * m.median(name) / count for name in (OURS, TORCH)}
    text = ", ".join(f"{name} {value:.2f}" for name, value in each.items())
    answer(case, f"{text}; {words}", ratios | each, value=ratios["ratio"], target=target, measurement=m)
    benchmark.pedantic(runs[0], rounds=5)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@each_optimizer
@pytest.mark.parametrize("count", COUNTS)
def test_state_dict(count: int, name: str, benchmark: Callable, answer: Callable, patience: float) -> None:
    ours, theirs = stepped(name, count)
    assert_alike(ours.state_dict(), theirs.state_dict())
    case = f"{name}, {count:,} parameters, state_dict"
    ask(answer, benchmark, case, (ours.state_dict, theirs.state_dict), count, TARGET_SAVED, patience, rounds=5)


@each_optimizer
@pytest.mark.parametrize("count", COUNTS)
def test_load_state_dict(count: int, name: str, benchmark: Callable, answer: Callable, patience: float) -> None:
    ours, theirs = stepped(name, count)
    saved, other = ours.state_dict(), theirs.state_dict()
    assert_alike(saved, other)
    # Torch goes through all parameters for every value: 40,000 take half a minute.
    how = {"rounds": 1, "warm_up": 0} if count == max(COUNTS) else {"rounds": 5}
    case = f"{name}, {count:,} parameters, load_state_dict"
    runs = lambda: ours.load_state_dict(saved), lambda: theirs.load_state_dict(other)
    ask(answer, benchmark, case, runs, count, TARGET_SAVED, patience, **how)
    assert_alike(ours.state_dict(), theirs.state_dict())


@each_optimizer
def test_constructor(name: str, benchmark: Callable, answer: Callable, patience: float) -> None:
    params = parameters(MADE)

    def make(package: Any) -> Optimizer:
        return getattr(package, name)(params, **OPTIMIZERS[name])

    runs = lambda: make(triton_optim), lambda: make(torch.optim)
    case = f"{name}, {MADE:,} parameters, constructor"
    ask(answer, benchmark, case, runs, MADE, TARGET_MADE, patience, rounds=5)


@each_optimizer
@pytest.mark.parametrize("groups", [1, 1_000])
def test_add_param_group(groups: int, name: str, benchmark: Callable, answer: Callable, patience: float) -> None:
    """All parameters in one group, or as many groups as are given, added one after the other."""
    first, params = parameters(1), parameters(MADE)
    size = MADE // groups

    def add(package: Any) -> None:
        optimizer = getattr(package, name)(first, **OPTIMIZERS[name])
        for start in range(0, MADE, size):
            optimizer.add_param_group({"params": params[start : start + size]})

    case = f"{name}, {MADE:,} parameters, add_param_group of {size:,}"
    runs = lambda: add(triton_optim), lambda: add(torch.optim)
    ask(answer, benchmark, case, runs, MADE, TARGET_MADE, patience, rounds=5 if groups == 1 else 2)
