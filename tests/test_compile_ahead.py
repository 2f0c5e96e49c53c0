"""What is done beside the program from when an optimizer is made, and that the first compilation waits for it."""

from __future__ import annotations

import threading

import pytest
import torch

import triton_optim
from triton_optim import dispatch
from triton_optim.backends.triton import compile_ahead


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    monkeypatch.setattr(compile_ahead, "start", lambda: made.append(1))
    return made


def test_an_optimizer_of_another_backend_begins_nothing(begun: list[int]) -> None:
    triton_optim.AdamW([torch.nn.Parameter(torch.zeros(3))], backend="eager")
    assert begun == []


@pytest.mark.parametrize("interpreter", [False, True])
def test_an_optimizer_of_the_triton_backend_begins_where_triton_compiles(
    begun: list[int], interpreter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = dispatch.this_machine()._replace(interpreter=interpreter)
    monkeypatch.setattr("triton_optim.core.optimizer.this_machine", lambda: machine)
    monkeypatch.setattr("triton_optim.core.optimizer.choose", lambda *_: dispatch.Choice("triton", "a test"))
    triton_optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    assert bool(begun) != interpreter


def test_it_is_begun_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    go, done = threading.Event(), []

    def run() -> None:
        assert go.wait(60)
        done.append(threading.current_thread().name)

    monkeypatch.setattr(compile_ahead, "_thread", None)
    monkeypatch.setattr(compile_ahead, "_run", run)
    compile_ahead.wait()  # for nothing
    compile_ahead.start()
    compile_ahead.start()
    assert done == []
    go.set()
    compile_ahead.wait()
    assert done == ["triton_optim.backends.triton.compile_ahead"]
