"""Optimizers whose update of an element needs more than its own gradient: a prologue, and then a rule."""

from typing import Any, NamedTuple

import pytest
import torch
from conftest import HAS_TRITON
from launches import watch_launches
from one_step import step_with
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.core import factored
from triton_optim.engine import entries
from triton_optim.kernels.language import jit
from triton_optim.spec import State


class DescentScalars(NamedTuple):
    lr: float
    momentum: float


@jit
def descent(p, g, momentum_buffer, h):
    momentum_buffer = h.momentum * momentum_buffer + g
    return p - h.lr * momentum_buffer, momentum_buffer


class NormalizedSGD(triton_optim.RuleOptimizer):
    """Gradients of norm 1, and momentum; it counts how often each parameter was seen."""

    rule = descent
    states = (State("momentum_buffer"),)
    kept_states = (State("seen", lambda p, _: torch.zeros(2, device=p.device)),)

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9, **options: Any) -> None:
        self.calls: list[int] = []
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> DescentScalars:
        return DescentScalars(group["lr"], group["momentum"])

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        self.calls.append(len(params))
        for state in states:
            state["seen"] += 1
        return [g / g.double().norm().clamp(min=1e-30) for g in gradients]


SHAPES = [(5, 3), (7,), (), (2, 3, 4), (0, 2)]


def expected(start: list[Tensor], gradients: list[list[Tensor | None]], sign: float = 1.0) -> list[Tensor]:
    params = [x.double() for x in start]
    buffers = [torch.zeros_like(p) for p in params]
    for own in gradients:
        for i, g in enumerate(own):
            if g is not None:
                buffers[i] = 0.9 * buffers[i] + sign * g.double() / g.double().norm().clamp(min=1e-30)
                params[i] = params[i] - 0.1 * buffers[i]
    return params


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rule_gets_what_the_prologue_made(
    dtype: torch.dtype, maximize: bool, backend: str, device: torch.device
) -> None:
    start = [torch.randn(shape, dtype=dtype, device=device) for shape in SHAPES]
    gradients: list[list[Tensor | None]] = [[torch.randn_like(x) for x in start] for _ in range(4)]
    gradients[1][0] = gradients[2][3] = None
    params = [Parameter(x.clone()) for x in start]
    optimizer = NormalizedSGD(params, maximize=maximize, backend=backend)
    for own in gradients:
        step_with(optimizer, params, [None if g is None else g.clone() for g in own])
    for p, end in zip(params, expected(start, gradients, -1.0 if maximize else 1.0), strict=True):
        torch.testing.assert_close(p.detach().double(), end, rtol=1e-5, atol=1e-6)
    assert [int(optimizer.state[p]["seen"][0]) for p in params] == [3, 4, 4, 3, 4]


def test_gradients_are_not_rewritten(backend: str, device: torch.device) -> None:
    p = Parameter(torch.ones(4, 3, device=device))
    p.grad = torch.full((4, 3), 2.0, device=device)
    NormalizedSGD([p], maximize=True, backend=backend).step()
    assert torch.equal(p.grad, torch.full((4, 3), 2.0, device=device))


def test_one_call_for_what_was_counted_alike(backend: str, device: torch.device) -> None:
    """Whatever the buckets: dtypes, alignment, and tensors without elements make several."""
    base = torch.randn(20, device=device)
    params = [
        Parameter(base[1:9].view(2, 4)),  # misaligned
        Parameter(torch.randn(3, device=device, dtype=torch.float64)),
        Parameter(torch.randn(4, 4, device=device)),
        Parameter(torch.randn(0, device=device)),
    ]
    optimizer = NormalizedSGD([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}], backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.calls == [3, 1] * 2


def test_updates_laid_out_or_aligned_otherwise(backend: str, device: torch.device) -> None:
    """The prologue may return any views; the rule's kernels get them as they need them."""

    class Strange(NormalizedSGD):
        def prologue(self, group, h, params, gradients, states):  # type: ignore[no-untyped-def]
            made = super().prologue(group, h, params, gradients, states)
            views = []
            for x in made:
                if x.dim() == 2:
                    views.append(x.t().contiguous().t())
                else:
                    views.append(torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape))
            return views

    start = [torch.randn(shape, device=device) for shape in [(5, 3), (8,), (4, 4)]]
    gradients = [[torch.randn_like(x) for x in start] for _ in range(3)]
    params = [Parameter(x.clone()) for x in start]
    optimizer = Strange(params, backend=backend)
    for own in gradients:
        step_with(optimizer, params, [g.clone() for g in own])
    for p, end in zip(params, expected(start, gradients), strict=True):
        torch.testing.assert_close(p.detach().double(), end, rtol=1e-5, atol=1e-6)


UPDATES = {
    "one too small": lambda g: [g[0][:2], g[1]],
    "one of one number": lambda g: [g[0].sum(), g[1]],
    "one on meta": lambda g: [g[0], g[1].to("meta")],
    "one that is sparse": lambda g: [g[0].to_sparse(), g[1]],
    "one that is complex": lambda g: [g[0], g[1].to(torch.complex64)],
    "one too few": lambda g: g[:1],
    "no tensor": lambda g: [g[0], None],
    "nothing": lambda g: None,
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_updates_unlike_their_gradients(update: Any, backend: str, device: torch.device) -> None:
    """Compiled code would read past their ends."""

    class Odd(NormalizedSGD):
        def prologue(self, group: Any, h: Any, params: Any, gradients: list[Tensor], states: Any) -> Any:
            return update(gradients)

    params = [Parameter(torch.ones(shape, device=device)) for shape in ((4, 3), (5,))]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"Odd.prologue returned .* one real tensor for each, of its shape"):
        Odd(params, backend=backend).step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)


def test_states_of_a_prologue_are_saved_and_loaded() -> None:
    p = Parameter(torch.ones(3))
    optimizer = NormalizedSGD([p], backend="eager")
    p.grad = torch.ones(3)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0].keys() == {"momentum_buffer", "seen", "step"}
    resumed = NormalizedSGD([p], backend="eager")
    resumed.load_state_dict(saved)
    assert torch.equal(resumed.state[p]["seen"], torch.ones(2))
    saved["state"][0]["seen"] = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"seen of parameter 0 has shape \(5,\)"):
        resumed.load_state_dict(saved)


def test_a_state_that_was_deleted_comes_back_with_the_gradient(backend: str, device: torch.device) -> None:
    params = [Parameter(torch.ones(4, device=device)) for _ in range(2)]
    optimizer = triton_optim.Adafactor(params, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    del optimizer.state[params[1]]["variance"]
    g, params[1].grad = params[1].grad, None
    optimizer.step()
    assert "variance" not in optimizer.state[params[1]]
    params[1].grad = g
    optimizer.step()
    assert "variance" in optimizer.state[params[1]]


def test_explained_with_its_operations() -> None:
    optimizer = NormalizedSGD([Parameter(torch.ones(10, 2))], backend="eager")
    (report,) = triton_optim.explain(optimizer)
    plain = triton_optim.SGD([Parameter(torch.ones(10, 2))], momentum=0.9, backend="eager")
    assert report.launches > triton_optim.explain(plain)[0].launches
    assert report.bytes_per_parameter > 20


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_one_launch_after_the_prologue(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    launches = []
    watch_launches(monkeypatch, lambda *_: launches.append(1))
    params = [Parameter(torch.randn(4, 4, device=device)) for _ in range(6)]
    optimizer = NormalizedSGD(params, backend="triton")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert len(launches) == 1


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_gradients_through_the_step(name: str) -> None:
    def stepped(p: Tensor, g: Tensor) -> Tensor:
        p = p.clone()
        rate = torch.tensor(0.02, dtype=torch.float64)
        optimizer = getattr(triton_optim, name)([p], lr=rate, differentiable=True)
        p.grad = g.clone()
        optimizer.step()
        return p

    p, g = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(stepped, (p, g))


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "NormalizedSGD"])
def test_in_pieces(name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step in one piece gives, for less memory: no update outlives its piece."""
    cls = globals().get(name) or getattr(triton_optim, name)
    start = [torch.randn(shape, device=device) for shape in [(4, 6), (6, 4), (5, 5), (3, 2), (4, 6)]]
    gradients = [[torch.randn_like(x) for x in start] for _ in range(3)]
    ends = []
    for piece in (1 << 27, 40):
        monkeypatch.setattr(entries, "PIECE", piece)
        params = [Parameter(x.clone()) for x in start]
        optimizer = cls(params, backend=backend)
        for own in gradients:
            step_with(optimizer, params, [g.clone() for g in own])
        ends.append([p.detach() for p in params])
    assert [report.tensors for report in triton_optim.explain(optimizer)] == [1, 3, 1]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # batches of matrices differ


@pytest.mark.parametrize("name", ["Adafactor", "AdafactorRelative", "CAME"])
def test_all_parameters_are_taken_together_where_launches_cost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = [torch.randn(shape) for shape in [(4, 6), (5,), (2, 3, 4), (3, 2), ()]]
    gradients = [[torch.randn_like(x) for x in start] for _ in range(3)]
    ends = []
    for alone in (("cpu",), ()):
        monkeypatch.setattr(factored, "ONE_BY_ONE", alone)
        params = [Parameter(x.clone()) for x in start]
        optimizer = getattr(triton_optim, name)(params, backend="eager")
        for own in gradients:
            step_with(optimizer, params, [g.clone() for g in own])
        ends.append([p.detach() for p in params])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
