"""States in memory that processes share, as those of asynchronous training (A3C): what one counts the others see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim


def shared(shapes: list[tuple[int, ...]], kind: Any, **options: Any) -> tuple[list[Parameter], Any]:
    """Parameters and an optimizer's states in shared memory, after the step that made these."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape)).share_memory_() for shape in shapes]
    optimizer = kind(params, **options)
    give(params, 0)
    optimizer.step()
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone().share_memory_()
    return params, optimizer


def give(params: list[Parameter], step: int) -> None:
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape)


SHAPES = [(3, 2), (5,), ()]


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_numbers_stay_where_they_are_shared(name: str, backend: str) -> None:
    params, optimizer = shared(SHAPES, getattr(triton_optim, name), lr=0.1, backend=backend)
    others, theirs = shared(SHAPES, getattr(torch.optim, name), lr=0.1)
    held = [{k: v for k, v in optimizer.state[p].items() if not v.dim()} for p in params]
    for step in range(1, 4):
        for both, own in ((params, optimizer), (others, theirs)):
            give(both, step)
            own.step()
    for p, q, numbers in zip(params, others, held, strict=True):
        assert numbers["step"] == 4.0
        for key, value in numbers.items():
            now = optimizer.state[p][key]
            assert now.is_shared()
            assert now.data_ptr() == value.data_ptr()
            torch.testing.assert_close(value, theirs.state[q][key])
        torch.testing.assert_close(p, q)


def test_states_are_moved_between_two_steps(backend: str) -> None:
    """What is shared is moved where it is: the tensors stay the same objects."""
    params, others = ([Parameter(torch.ones(shape)) for shape in SHAPES] for _ in range(2))
    optimizer = triton_optim.AdamW(params, lr=0.1, backend=backend)
    theirs = torch.optim.AdamW(others, lr=0.1)
    for step in range(4):
        for both, own in ((params, optimizer), (others, theirs)):
            give(both, step)
            own.step()
            if step == 1:
                for state in own.state.values():
                    for value in state.values():
                        value.share_memory_()
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p]["step"] == 4.0
        torch.testing.assert_close(p, q)


def train_with(_: int, params: list[Parameter], optimizer: Any) -> None:
    """In a process that is started with an optimizer."""
    assert optimizer.param_groups[0]["params"][0] is params[0]
    assert optimizer.max_grad_norm == 1e9
    give(params, 1)
    optimizer.step()


@pytest.mark.parametrize("kind", [triton_optim.AdamW, triton_optim.cautious(triton_optim.AdamW)])
def test_a_process_is_started_with_an_optimizer(kind: Any) -> None:
    torch.manual_seed(0)
    params = [Parameter(torch.randn(64, 80)).share_memory_(), Parameter(torch.randn(3)).share_memory_()]
    twins = [Parameter(p.detach().clone()) for p in params]
    options: dict[str, Any] = {"lr": 0.1, "max_grad_norm": 1e9, "state_dtype": "int8", "backend": "eager"}
    optimizer, twin = kind(params, **options), kind(twins, **options)
    give(params, 0)
    optimizer.step()
    torch.multiprocessing.spawn(train_with, (params, optimizer))
    give(params, 2)
    optimizer.step()
    for step in range(3):
        give(twins, step)
        twin.step()
    for p, q in zip(params, twins, strict=True):
        assert optimizer.state[p]["step"] == 3.0
        assert torch.equal(p, q)


def work(params: list[Parameter], states: list[dict[str, Tensor]], step: int) -> None:
    """What a worker of asynchronous training does."""
    optimizer = triton_optim.AdamW(params, lr=0.1, backend="eager")
    optimizer.state.update(zip(params, states, strict=True))
    for own in (step, step + 1):
        give(params, own)
        optimizer.step()


def test_steps_of_other_processes_are_counted() -> None:
    params, optimizer = shared(SHAPES, triton_optim.AdamW, lr=0.1, backend="eager")
    others, theirs = shared(SHAPES, torch.optim.AdamW, lr=0.1)
    for step in (1, 2):
        give(params, step)
        optimizer.step()
    context = torch.multiprocessing.get_context("fork")
    worker = context.Process(target=work, args=(params, [dict(optimizer.state[p]) for p in params], 3))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    give(params, 5)
    optimizer.step()
    for step in range(1, 6):
        give(others, step)
        theirs.step()
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p]["step"] == 6.0
        torch.testing.assert_close(p, q)
