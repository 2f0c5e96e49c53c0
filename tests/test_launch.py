"""Every step through Triton's own launch, for a GPU that is not there; see child_process.py and launches.py."""

from __future__ import annotations

import pytest
import torch
import triton
from launches import Recorder, Spy, check_step, forget_kernels
from steps import Step, every_step

from triton_optim import stub_driver

pytestmark = pytest.mark.compiled

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """An sm_90 that takes down what is launched; nothing is in its memory."""
    recorder = Recorder()
    forget_kernels()
    monkeypatch.setattr(triton.knobs.compilation, "listener", recorder.on_compile)
    recorder.install("sm_90")
    yield recorder
    stub_driver.install()


def take_two_steps(gpu: Recorder, step: Step) -> None:
    """Compile in the first only."""
    optimizer = step.optimizer("triton", CPU)
    spy = Spy(optimizer)
    for number in range(2):
        step.give_gradients(optimizer)
        optimizer.step()
        check_step(gpu.taken(), optimizer, spy)
        assert number == 0 or not gpu.compiled
        gpu.compiled.clear()


@pytest.mark.parametrize("name", every_step())
def test_launches_are_what_the_kernels_declare(name: str, gpu: Recorder) -> None:
    take_two_steps(gpu, every_step()[name])
