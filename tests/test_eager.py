"""What only the eager backend does: complex parameters, autograd through the step; and what needs no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from one_step import step_with
from side_by_side import assert_same, train
from table import CASES, KINDS, Case, rows, rows_and_backends

import triton_optim

# Of matrices and of sparse rows torch has no complex ones.
COMPLEX = [case for case in CASES if case.complex]
# A matrix is orthogonalised in bfloat16, in which no difference quotient is a derivative; sparse rows have none.
DIFFERENTIABLE = [case for case in CASES if case.peer_takes("differentiable") and not case.matrices]


@rows(*(case for case in COMPLEX if case.torchs is not None))
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    for options in case.variants.values():
        params, theirs = (case.parameters(device, dtype) for _ in range(2))
        optimizer, torchs = case.ours(params, **options), case.torchs(theirs, **options, foreach=False)
        train(case, range(4), (params, optimizer), (theirs, torchs))
        if dtype == torch.complex64:
            assert_same(case, optimizer, torchs)
        else:  # carried numbers are float32 in both, and rounded at different places
            assert_same(case, optimizer, torchs, rtol=1e-6, atol=1e-9)


@rows(*(case for case in KINDS if case.complex))
def test_complex_is_not_pinned_elsewhere(case: Case, device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
    for backend in ("compiled", "cpp", "triton"):
        with pytest.raises(RuntimeError, match="complex64"):
            case.ours([p], backend=backend)


def steps(case: Case, start: torch.Tensor, gradients: torch.Tensor, lr: Any, **options: Any) -> torch.Tensor:
    p = start.clone()
    optimizer = case.ours([p], lr=lr, differentiable=True, **options)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p


@rows(*DIFFERENTIABLE)
def test_gradients_through_the_step(case: Case, device: torch.device) -> None:
    start = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    gradients = torch.randn(3, 3, dtype=torch.float64, device=device, requires_grad=True)
    for options in case.variants.values():
        own = {k: v for k, v in options.items() if k != "lr"}
        assert torch.autograd.gradcheck(
            lambda p, g, own=own: steps(case, p, g, 0.1, **own), (start, gradients), raise_exception=True
        )


@rows(*DIFFERENTIABLE)
def test_gradient_of_the_learning_rate(case: Case, device: torch.device) -> None:
    if case.ours is triton_optim.ASGD:
        pytest.skip("as in torch, its state keeps the rate of the next step, as a number outside the graph")
    if case.ours is triton_optim.AdamC:
        pytest.skip("the largest rate is kept as a number outside the graph")
    start, gradients = torch.randn(3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda lr: steps(case, start + 0 * lr, gradients, lr), (lr,))


def test_gradient_of_radams_learning_rate_where_the_variance_can_not_be_told(device: torch.device) -> None:
    """The quotient is not used, and may not be 0 / 0: its derivative would be NaN."""
    start, gradients = torch.ones(2, dtype=torch.float64, device=device), torch.tensor([[0.0, 3.0]], device=device)
    lr = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    case = next(case for case in CASES if case.name == "RAdam")
    end = steps(case, start, gradients.double(), lr, eps=0.0)
    end.sum().backward()
    assert end.tolist() == [1.0, -0.5]
    assert lr.grad is not None
    assert lr.grad.item() == -3.0


@rows_and_backends(*CASES)
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_capturable_forms_its_scalars_on_the_device(case: Case, kind: str, backend: str, device: torch.device) -> None:
    lr = 0.1 if kind == "number" else torch.tensor(0.1, device=device)
    results = []
    for capturable in (False, True):
        params = case.parameters(device)
        optimizer = case.ours(params, lr=lr, capturable=capturable, backend=backend)
        train(case, range(3), (params, optimizer))
        results.append([p.detach() for p in params])
        for p in params if case.counts_steps else ():
            assert optimizer.state[p]["step"].item() == 3
            on_device = capturable or case.ours.counts_on_device
            assert optimizer.state[p]["step"].device.type == (p.device.type if on_device else "cpu")
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


BARE = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, triton_optim
assert not triton_optim.dispatch.this_machine().compiler
p = torch.nn.Parameter(torch.ones(3))
q = torch.nn.Parameter(torch.ones(3))
for optimizer_class in ("AdamW", "Adam", "SGD"):
    ours, theirs = (getattr(m, optimizer_class)([x], lr=0.1) for m, x in ((triton_optim, p), (torch.optim, q)))
    p.grad = q.grad = torch.tensor([1.0, -2.0, 3.0])
    ours.step(), theirs.step()
    torch.testing.assert_close(p, q)
    (bucket,) = triton_optim.explain(ours)
    assert bucket.backend == "eager" and "no C++ compiler" in bucket.reason, bucket
for backend in ("triton", "cpp", "compiled"):
    try:
        triton_optim.Lion([p], backend=backend)
    except RuntimeError as error:
        print(error)
    else:
        raise AssertionError(backend)
triton_optim.Lion([p]).step()
assert not any(name == "triton" or name.startswith("triton.") for name, m in sys.modules.items() if m is not None)
"""


def test_without_triton_and_without_a_compiler() -> None:
    environment = {**os.environ, "PATH": "/nonexistent"}
    for name in ("CXX", "TRITON_INTERPRET"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", BARE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "leave backend out" in done.stdout


def test_import_is_light() -> None:
    """Neither the compiler nor sharded tensors are imported along: each takes longer than all of the package."""
    code = "import sys, torch; before = set(sys.modules); import triton_optim; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    added = done.stdout.split()
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "numpy", "rich", "sklearn", "matplotlib")
    assert not [name for name in added if name.startswith(heavy)]
    assert triton_optim.__name__ in added


def test_gradient_of_what_nadam_carries() -> None:
    """As torch: the product of the momenta is a state like the moments, of each parameter on its own."""
    gradients = torch.randn(3, 2, 4, dtype=torch.float64)

    def end(*products: torch.Tensor) -> torch.Tensor:
        params = [torch.zeros(4, dtype=torch.float64) for _ in products]
        optimizer = triton_optim.NAdam(params, lr=0.1, differentiable=True)
        for p, product in zip(params, products, strict=True):
            moments = {name: torch.ones_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] |= {"step": torch.tensor(3.0), "mu_product": product.clone(), **moments}
        for g in gradients:
            step_with(optimizer, params, [own.clone() for own in g])
        return torch.stack(params)

    products = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(end, products)
