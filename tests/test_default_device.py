"""Another default device: no number of an optimizer's own lies there, whatever the backend and the helper."""

import ast
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closures import closure_of
from torch.nn import Parameter
from torch.utils._device import _device_constructors

import triton_optim as to
from triton_optim import kernels
from triton_optim.backends.norms import partial_norms
from triton_optim.buckets.gradient_norm import Norm, norm_from

BF16 = torch.bfloat16
OPTIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (torch.float32, {}),
    "whole": (torch.float32, {"max_grad_norm": 0.5, "ema_decay": 0.9}),
    "coded": (BF16, {"state_dtype": "int8", "param_precision": "stochastic", "ema_decay": 0.9, "ema_dtype": BF16}),
    "capturable": (torch.float32, {"capturable": True}),
}
TOOLS = ("bench", "cli", "race")  # they run in processes of their own


@pytest.fixture
def elsewhere(device: torch.device) -> Iterator[torch.device]:
    """Where the parameters lie. The default device is the one that has no numbers."""
    torch.set_default_device("meta")
    yield device
    torch.set_default_device(None)


@pytest.mark.parametrize("options", list(OPTIONS))
def test_a_step(options: str, backend: str, elsewhere: torch.device) -> None:
    if backend == "compiled" and options != "plain":
        pytest.skip("each takes seconds to compile")
    ends = []
    for default in ("meta", "cpu"):
        torch.set_default_device(default)
        dtype, more = OPTIONS[options]
        params = [Parameter(torch.ones(shape, dtype=dtype, device=elsewhere)) for shape in ((64, 64), (3, 4))]
        optimizer = to.AdamW(params, lr=0.1, backend=backend, **more)
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            if step == 2:
                params[0].grad = None
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        ends.append([p.detach() for p in params])
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][0], torch.ones_like(ends[0][0]))


@pytest.mark.parametrize("name", ["ASGD", "Adafactor", "Muon", "NAdam", "Rprop", "SGD"])
def test_the_next_step_of_others(name: str, elsewhere: torch.device) -> None:
    p = Parameter(torch.ones(3, 4, device=elsewhere))
    optimizer = getattr(to, name)([p], ema_decay=0.9)
    to.enable_gradient_release(optimizer)
    for _ in range(2):
        (p * p).sum().backward()
        optimizer.step()
    before = p.detach().clone()
    with optimizer.averaged_parameters():
        assert not torch.equal(p, before)
    assert (p < 1).all()


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_a_norm(order: float, backend: str, elsewhere: torch.device) -> None:
    if backend == "compiled" and order != 2:
        pytest.skip("each takes seconds to compile")
    tensors = [torch.ones(20_001, device=elsewhere), torch.ones(7, device=elsewhere)]
    norm = Norm(order)
    (found,) = partial_norms(tensors, norm, backend)
    assert float(norm_from(found, norm)) == pytest.approx(20_008 ** (1 / order))


def test_clipping(elsewhere: torch.device) -> None:
    p = Parameter(torch.zeros(2, device=elsewhere))
    p.grad = torch.tensor([3.0, 4.0], device=elsewhere)
    assert to.clip_grad_norm_([p], 1.0) == 5
    assert p.grad.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("cls", [to.LBFGS, to.NonlinearCG])
def test_a_closure(cls: Any, elsewhere: torch.device) -> None:
    p = Parameter(torch.zeros(3, device=elsewhere))
    optimizer = cls([p])
    for _ in range(2):
        optimizer.step(closure_of(optimizer, lambda p: (p - 1).square().sum(), [p]))
    torch.testing.assert_close(p, torch.ones_like(p), rtol=1e-3, atol=1e-3)


def test_no_tensor_is_made_without_a_device() -> None:
    """But for the norm of no gradients at all, which is torch's."""
    makers = {function.__name__ for function in _device_constructors()}
    found = []
    for folder in (Path(to.__file__).parent, Path(next(iter(kernels.__path__)))):
        for path in folder.rglob("*.py"):
            if path.relative_to(folder).parts[0] in TOOLS:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                made = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.")
                if made and node.func.attr in makers and not any(k.arg in ("device", None) for k in node.keywords):
                    found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == ["clipping.py: torch.tensor(0.0)"]
