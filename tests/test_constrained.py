"""What keeps a norm: MuonH and AdamH stay on their spheres, and Scion's parameters in their balls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_step import step_with
from references_constrained import scion
from torch import Tensor
from torch.nn import Parameter

import triton_optim

ON_SPHERES = ["MuonH", "AdamH"]
on_spheres = pytest.mark.parametrize("name", ON_SPHERES)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(optimizer: Any, p: Tensor, count: int) -> None:
    for k in range(count):
        p.grad = values(*p.shape, seed=k + 1).to(p.dtype)
        optimizer.step()


@on_spheres
def test_the_norm_stays(name: str, backend: str) -> None:
    p = Parameter(3 * values(6, 5))
    start = p.detach().clone()
    steps(getattr(triton_optim, name)([p], lr=0.3, backend=backend), p, 20)
    assert p.detach().norm().item() == pytest.approx(start.norm().item(), rel=1e-6)
    assert (p.detach() - start).norm() > 0.5 * start.norm()


@on_spheres
def test_a_step_is_as_long_as_the_rate_says(name: str) -> None:
    """Before it is brought back: the angle has the tangent lr / (1 - lr cos), of a gradient across lr."""
    p = Parameter(torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    optimizer = getattr(triton_optim, name)([p], lr=0.1, backend="eager")
    p.grad = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    optimizer.step()
    torch.testing.assert_close(p.detach(), 3 / 1.01**0.5 * torch.tensor([[1.0, 0.0], [0.0, -0.1]]))


@on_spheres
def test_they_come_to_a_minimum_of_their_norm(name: str) -> None:
    p, target = Parameter(values(4, 3)), values(4, 3, seed=5)
    target *= p.detach().norm() / target.norm()
    optimizer = getattr(triton_optim, name)([p], lr=0.1, backend="eager")
    first = (p.detach() - target).norm()
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        p.grad = p.detach() - target
        optimizer.step()
    assert (p.detach() - target).norm() < 1e-2 * first


@on_spheres
def test_what_is_0_stays_0(name: str) -> None:
    p, q = Parameter(torch.zeros(3, 2)), Parameter(torch.ones(3, 2))
    optimizer = getattr(triton_optim, name)([p, q], lr=0.1, backend="eager")
    for _ in range(2):
        p.grad, q.grad = torch.ones_like(p), torch.zeros_like(q)  # and a gradient of 0 moves nothing
        optimizer.step()
    assert torch.equal(p, torch.zeros(3, 2))
    torch.testing.assert_close(q.detach(), torch.ones(3, 2), rtol=1e-6, atol=0)


@on_spheres
def test_the_norm_is_that_before_the_first_step(name: str) -> None:
    """Kept with the state, also where what a parameter holds is changed meanwhile."""
    p = Parameter(values(4, 3))
    first = p.detach().norm().item()
    optimizer = getattr(triton_optim, name)([p], backend="eager")
    steps(optimizer, p, 1)
    name = next(name for name in optimizer.state[p] if name.startswith("initial"))
    assert optimizer.state[p][name].sum().item() == pytest.approx(first)
    resumed = type(optimizer)([p], backend="eager")
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        p.mul_(2)
    steps(resumed, p, 1)
    assert p.detach().norm().item() == pytest.approx(first)


def test_each_matrix_of_a_batch_keeps_its_own_norm() -> None:
    p = Parameter(values(3, 4, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None])
    start = p.detach().clone()
    steps(triton_optim.MuonH([{"params": [p], "extra_dims": "batch"}], lr=0.3, backend="eager"), p, 10)
    torch.testing.assert_close(p.detach().norm(dim=(1, 2)), start.norm(dim=(1, 2)))


@on_spheres
def test_half_precision(name: str) -> None:
    """The norm is right to the parameter's rounding."""
    p = Parameter(values(16, 16).bfloat16())
    first = p.detach().float().norm().item()
    steps(getattr(triton_optim, name)([p], lr=0.1, backend="eager"), p, 10)
    assert p.detach().float().norm().item() == pytest.approx(first, rel=2**-9)


def test_no_decay_on_a_sphere() -> None:
    p = Parameter(values(4, 3))
    with pytest.raises(ValueError, match=r'weight_decay value: 0\.1.*"hyperball": False'):
        triton_optim.AdamH([{"params": [p], "weight_decay": 0.1}])
    with pytest.raises(ValueError, match=r'weight_decay value: 0\.1.*"use_muon": False'):
        triton_optim.MuonH([{"params": [p], "weight_decay": 0.1}])


def test_groups_beside_the_sphere_are_adamws() -> None:
    """Of AdamH, as those of Muon are."""
    ends = []
    for cls, options in ((triton_optim.AdamH, {"hyperball": False}), (triton_optim.AdamW, {})):
        p = Parameter(values(5))
        group = {"params": [p], "weight_decay": 0.1, **options}
        optimizer = cls([group], lr=0.1, betas=(0.9, 0.95), backend="eager")
        steps(optimizer, p, 3)
        assert "initial_norm" not in optimizer.state[p]
        ends.append(p.detach())
    assert torch.equal(*ends)


# Scion.

SHAPES = {
    "auto": [(4, 3), (5,), (), (6, 3, 2, 2), (4, 2, 3)],
    "spectral": [(4, 3), (3, 7), (6, 3, 2, 2)],
    "spectral_max": [(4, 3), (3, 7), (6, 3, 2, 2)],
    "sign": [(4, 3), (3, 7)],
    "rows": [(4, 3), (3, 7)],
    "columns": [(4, 3), (3, 7)],
    "embedding": [(4, 3), (3, 7)],
    "rms": [(4, 3), (5,)],
}
each_norm = pytest.mark.parametrize("norm", SHAPES)


@each_norm
@pytest.mark.parametrize("unconstrained", [False, True])
def test_every_norm_is_the_references(norm: str, unconstrained: bool) -> None:
    params = [Parameter(values(*shape).double()) for shape in SHAPES[norm]]
    start = [p.detach().clone().numpy() for p in params]
    options = {"lr": 0.1, "norm": norm, "scale": 3.0, "unconstrained": unconstrained, "momentum": 0.3}
    optimizer = triton_optim.Scion(params, **options, backend="eager")
    gradients = [[values(*p.shape, seed=k).double() for p in params] for k in range(4)]
    for own in gradients:
        step_with(optimizer, params, [g.clone() for g in own])
    ends, _ = scion(start, [[g.numpy() for g in own] for own in gradients], **options)
    for p, end in zip(params, ends, strict=True):
        torch.testing.assert_close(p.detach(), torch.from_numpy(end), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["sign", "rows", "columns", "embedding", "spectral"])
def test_parameters_stay_in_their_ball(norm: str) -> None:
    """Where they come into it; the singular values of Muon's iteration are below 1.3."""
    p = Parameter(values(4, 3))
    optimizer = triton_optim.Scion([p], lr=0.1, norm=norm, scale=2.0, backend="eager")
    steps(optimizer, p, 100)
    sizes = {
        "sign": lambda x: x.abs().max() * 3,
        "rows": lambda x: x.norm(dim=1).max() * 3**0.5,
        "columns": lambda x: x.norm(dim=0).max() / 4**0.5,
        "embedding": lambda x: x.norm(dim=1).max() / 3**0.5,
        "spectral": lambda x: torch.linalg.matrix_norm(x, 2) / (4 / 3) ** 0.5 / 1.3,
    }
    assert sizes[norm](p.detach()) < 2.0 + 1e-3


@pytest.mark.parametrize("norm", ["spectral", "sign", "rows", "columns", "embedding"])
def test_a_norm_of_matrices_is_of_matrices(norm: str) -> None:
    with pytest.raises(ValueError, match=rf"norm='{norm}'.*shape \(5,\).*\"auto\""):
        triton_optim.Scion([Parameter(values(5))], norm=norm)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "Spectral"}, "Invalid norm: 'Spectral'. Use one of 'auto', 'spectral'"),
        ({"momentum": 1.1}, "Invalid momentum value: 1.1. It is the weight of what is new, at most 1"),
        ({"momentum": -0.1}, "Invalid momentum value"),
        ({"scale": -1.0}, "Invalid scale value"),
        ({"ns_coefficients": "quintic"}, "Invalid ns_coefficients"),
    ],
)
def test_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        triton_optim.Scion([Parameter(values(4, 3))], **options)


def test_momentum_of_1_keeps_the_last_gradient() -> None:
    p = Parameter(values(4, 3))
    optimizer = triton_optim.Scion([p], momentum=1.0, backend="eager")
    steps(optimizer, p, 3)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], values(4, 3, seed=3))
