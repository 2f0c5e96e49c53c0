"""Tensors that were made in inference mode: gradients may be, what a step writes may not."""

from __future__ import annotations

import pytest
import torch
from one_step import step_with
from state_machine import BY_NAME
from state_machine import uncompiled as uncompiled
from table import KINDS, Case, rows
from torch import Tensor
from torch.nn import Parameter

import triton_optim as to

pytestmark = pytest.mark.usefixtures("gradients_are", "uncompiled")
MIDDLE = 3


def made(device: torch.device) -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(4, 4, generator=random).to(device)) for _ in range(7)]


def test_a_gradient_of_inference_mode_is_read(backend: str, device: torch.device) -> None:
    """As torch does, of those who estimate gradients by forward passes."""
    params = made(device)
    with torch.inference_mode():
        gradients = [torch.ones_like(p) for p in params]
    before = [p.detach().clone() for p in params]
    opt = to.SGD(params, lr=0.5, backend=backend)
    for _ in range(2):
        step_with(opt, params, gradients)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 1)


def with_other_data(value: Tensor) -> Tensor:
    """A tensor that says that it is an ordinary one, and of which torch makes no view."""
    with torch.inference_mode():
        tensor = torch.zeros_like(value)
    tensor.data = value.clone()
    return tensor


@rows(*(row for row in KINDS if not row.sparse), BY_NAME["SOAP"], BY_NAME["Shampoo"])
def test_a_gradient_of_inference_mode_with_other_data(case: Case, backend: str, device: torch.device) -> None:
    if backend not in ("eager", "cpp") and not case.on_every_backend:
        backend = "auto"
    ended = []
    for kind in (Tensor.clone, with_other_data):
        random = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(shape, generator=random).to(device)) for shape in case.shapes]
        opt = case.ours(params, **case.settings, backend=backend)
        for _ in range(2):
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=random).to(device)
                p.grad = kind(g) if i != 1 else g
            opt.step()
        ended.append([p.detach() for p in params])
    assert all(map(torch.equal, *ended))


@pytest.mark.parametrize("what", ["parameter", "state", "state with other data"])
def test_a_tensor_of_inference_mode_is_refused(what: str, backend: str, device: torch.device) -> None:
    """Before anything is written, and not halfway."""
    params = made(device)
    opt = to.SGD(params, lr=0.1, momentum=0.5, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    with torch.inference_mode():
        if what != "parameter":
            state = opt.state[params[MIDDLE]]
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        else:
            params[MIDDLE] = opt.param_groups[0]["params"][MIDDLE] = Parameter(params[MIDDLE].clone(), False)
            params[MIDDLE].grad = torch.ones_like(params[MIDDLE])
    if what == "state with other data":  # which says that it is an ordinary tensor
        state["momentum_buffer"].data = torch.zeros_like(params[MIDDLE])
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"parameter {MIDDLE}, or .* was made in inference mode"):
        opt.step()
    assert all(map(torch.equal, params, before))
    if what == "state":  # a step in inference mode may write it, which says nothing of the next
        with torch.inference_mode():
            opt.step()
        before = [p.detach().clone() for p in params]
        with pytest.raises(RuntimeError, match=f"parameter {MIDDLE}, or .* was made in inference mode"):
            opt.step()
        assert all(map(torch.equal, params, before))
