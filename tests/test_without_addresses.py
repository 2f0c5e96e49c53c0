"""Tensors whose elements lie at no address: they are stepped by operations of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table import KINDS, Case, rows
from torch.nn import Parameter
from two_tensor import TwoTensor, parameter, value_of

import triton_optim as to

pytestmark = pytest.mark.usefixtures("gradients_are")
PINNED = ("cpp", "compiled", "triton")


@rows(*(row for row in KINDS if row.elementwise and not row.sparse))
def test_a_wrapper_is_stepped_by_its_own_operations(case: Case, device: torch.device) -> None:
    ended = []
    for wraps in (False, True):
        random = torch.Generator().manual_seed(0)
        values = [torch.randn(4, generator=random).to(device) for _ in range(3)]
        params = [parameter(v) if wraps and i == 1 else Parameter(v) for i, v in enumerate(values)]
        opt = case.ours(params, lr=0.1, backend="eager" if not wraps else "auto")
        for _ in range(3):
            for p in params:
                g = torch.randn(4, generator=random).to(device)
                p.grad = TwoTensor(g) if isinstance(p, TwoTensor) else g
            opt.step()
        ended.append([value_of(p) if isinstance(p, TwoTensor) else p.detach() for p in params])
        if wraps:
            assert opt.engine.plan is not None
            assert {b.key.choice.backend for b in opt.engine.plan.buckets if any(m.index == 1 for m in b.slots)} == {
                "eager"
            }
    for plain, wrapped in zip(*ended, strict=True):
        torch.testing.assert_close(wrapped, plain)


@pytest.mark.parametrize("name", PINNED)
def test_a_pinned_backend_refuses_a_wrapper(name: Any, device: torch.device) -> None:
    if name == "cpp" and device.type != "cpu":
        pytest.skip("the C++ backend needs CPU tensors")
    with pytest.raises(RuntimeError, match=r'only its own operations reach\. Use backend="eager"'):
        to.AdamW([parameter(torch.ones(4, device=device))], lr=0.1, backend=name)


@pytest.mark.parametrize("late", [False, True])
def test_a_wrapper_as_gradient_is_used(late: bool, device: torch.device) -> None:
    """From the first step on, and in place of an ordinary one."""
    params = [Parameter(torch.ones(4, device=device)) for _ in range(3)]
    opt = to.SGD(params, lr=1.0)
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        if not late or step == 2:
            params[1].grad = TwoTensor(torch.ones(4, device=device))
        opt.step()
        assert all((p == -step).all() for p in params)


def test_a_pinned_backend_refuses_a_wrapper_as_gradient(backend: str, device: torch.device) -> None:
    p = Parameter(torch.ones(4, device=device))
    opt = to.SGD([p], lr=1.0, backend=backend)
    for step in range(3):
        p.grad = torch.ones_like(p) if step < 2 else TwoTensor(torch.ones(4, device=device))
        if step == 2 and backend != "eager":
            with pytest.raises(RuntimeError, match="only its own operations reach"):
                opt.step()
            assert (p == -1).all()
        else:
            opt.step()
            assert (p == -step).all()


def test_a_wrapper_as_state_is_refused(backend: str, device: torch.device) -> None:
    p = Parameter(torch.ones(4, device=device))
    opt = to.SGD([p], lr=1.0, momentum=0.5, backend=backend)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["momentum_buffer"] = TwoTensor(torch.ones(4, device=device))
    with pytest.raises(RuntimeError, match="momentum_buffer of parameter 0 is a TwoTensor"):
        opt.step()
    assert (p == 0).all()


@pytest.fixture
def mesh(device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapper_in_a_sharded_parameter(mesh: Any, device: torch.device) -> None:
    """As FSDP2 holds what gathers in float8."""
    from torch.distributed.tensor import DTensor, Shard

    inner = TwoTensor(torch.ones(4, device=device))
    p = Parameter(DTensor.from_local(inner, mesh, [Shard(0)], run_check=False))
    opt = to.AdamW([p], lr=0.5, weight_decay=0.0)
    for _ in range(2):
        p.grad = DTensor.from_local(torch.ones(4, device=device), mesh, [Shard(0)], run_check=False)
        opt.step()
    torch.testing.assert_close(value_of(p.to_local()), torch.zeros(4, device=device), rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="only its own operations reach"):
        to.AdamW([p], lr=0.5, backend="compiled")
