"""Sums over each parameter before the rule, and the scalars that are made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim import RuleOptimizer
from triton_optim.kernels.language import RuleError, jit, where
from triton_optim.spec import Measured, State

# Chunks of every backend end within them, and before their first element.
SHAPES = [(1,), (0,), (), (7, 3), (1023,), (1024,), (1025,), (33, 65), (16385,)]


class Scalars(NamedTuple):
    lr: float
    scale: float  # a parameter's own


@jit
def sums(p, g, momentum, h):
    return 1.0 + p + momentum, g * g, where(g > 0, 1.0, 0.0)  # none is 0 past the end


@jit
def scaled(p, g, momentum, h):
    momentum = momentum + g
    return p - h.lr * h.scale * momentum, momentum


class Measuring(RuleOptimizer):
    """Steps as long as the root of a parameter's mean squared gradient."""

    rule, measure, states = scaled, sums, (State("momentum"),)

    def __init__(self, params: Any, lr: float = 0.5, **options: Any) -> None:
        self.seen: list[Measured] = []
        super().__init__(params, {"lr": lr}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], 1.0)

    def factors(self, measured: Measured) -> dict[str, Any]:
        self.seen.append(measured)
        _, squares, _ = measured.sums
        return {"scale": (squares / measured.numel.clamp(min=1)).sqrt()}


def trained(backend: str, dtype: torch.dtype = torch.float32, steps: int = 2, **options: Any) -> tuple[Any, list[Any]]:
    """Parameters, and after each step what was measured, and what had to be."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    optimizer, rounds = Measuring(params, backend=backend, **options), []
    sign = -1 if options.get("maximize") else 1
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        held = [optimizer.state[p].get("momentum", torch.zeros(())) for p in params]
        before = [m.double() if m.is_floating_point() else 0 for m in held]  # what codes stand for is not asked
        exact = torch.tensor(
            [
                [(1 + p.double() + m).sum().item(), g.square().sum().item(), float((sign * g > 0).sum())]
                for p, m, g in zip(params, before, [p.grad.double() for p in params], strict=True)
            ],
            dtype=torch.float64,
        )
        optimizer.seen.clear()
        optimizer.step()
        rounds.append((optimizer.seen[:], exact))
    return optimizer, rounds


def by_parameter(optimizer: Measuring, seen: list[Measured]) -> Tensor:
    """The sums in the order of the parameters."""
    at = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    found = torch.full((len(at), 3), float("nan"), dtype=torch.float64)
    for measured in seen:
        for i, p in enumerate(measured.params):
            assert measured.numel[i] == p.numel()
            found[at[id(p)]] = torch.stack([values[i] for values in measured.sums]).double().cpu()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_are_those_of_float64(backend: str, dtype: torch.dtype) -> None:
    optimizer, rounds = trained(backend, dtype, maximize=True)
    for seen, exact in rounds:
        found = by_parameter(optimizer, seen)
        # Chunks are summed in the dtype of the arithmetic, in no order that is promised.
        close = 1e-12 if dtype == torch.float64 else 1e-5
        assert torch.allclose(found, exact, rtol=close, atol=close * 100)
        assert found[:, 2].equal(exact[:, 2])


def test_a_parameter_moves_by_its_own_scale(backend: str) -> None:
    torch.manual_seed(0)
    params = [Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = Measuring([{"params": params[:4], "lr": 0.25}, {"params": params[4:]}], backend=backend)
    wanted, momenta = [torch.zeros(shape) for shape in SHAPES], [torch.zeros(shape) for shape in SHAPES]
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = None if (i + step) % 3 == 0 else torch.randn_like(p)
            if p.grad is not None:
                momenta[i] += p.grad
                scale = p.grad.square().mean().sqrt() if p.numel() else 0
                wanted[i] -= (0.25 if i < 4 else 0.5) * scale * momenta[i]
        optimizer.step()
    for p, value in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "int8"},
        {"state_dtype": "int4", "ema_decay": 0.5},
        {"state_dtype": torch.bfloat16, "max_grad_norm": 1.0},
        {"param_precision": "split24", "ema_decay": 0.9, "ema_dtype": torch.bfloat16},
        {"capturable": True},
    ],
    ids=lambda options: ", ".join(map(str, options.values())),
)
def test_options(backend: str, options: dict[str, Any]) -> None:
    """As the eager backend, which reads and writes by torch's operations."""
    dtype = torch.bfloat16 if "param_precision" in options else torch.float32
    ends = []
    for which in (backend, "eager"):
        optimizer, rounds = trained(which, dtype, **options)
        found = by_parameter(optimizer, rounds[-1][0])
        ends.append((found, [p.detach().float() for g in optimizer.param_groups for p in g["params"]]))
    assert torch.allclose(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_skipped_step_asks_for_no_factors(backend: str) -> None:
    p = Parameter(torch.ones(5))
    optimizer = Measuring([p], backend=backend, amp="fused")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient, steps in ((torch.full((5,), float("inf")), 0), (torch.full((5,), 2.0), 1)):
        scaler.scale(torch.zeros((), requires_grad=True))  # it is lazy
        p.grad = gradient * 4
        scaler.step(optimizer)
        scaler.update(4.0)
        assert len(optimizer.seen) == steps
    assert p.tolist() == [1 - 0.5 * 2 * 2] * 5


class Whole(Measuring):
    """One scale for the whole model."""

    def total(self, measured: list[Measured]) -> Any:
        return sum(m.sums[1].sum() for m in measured), sum(m.numel.sum() for m in measured)

    def factors(self, measured: Measured) -> dict[str, Any]:
        squares, numel = measured.total
        return {"scale": (squares / numel).sqrt()}


def test_sums_of_the_whole_model(backend: str) -> None:
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(5, dtype=torch.float64))]
    optimizer = Whole([{"params": params[:1]}, {"params": params[1:], "lr": 0.25}], backend=backend)
    params[0].grad, params[1].grad = torch.full((3,), 2.0), torch.zeros(5, dtype=torch.float64)
    optimizer.step()
    assert torch.allclose(params[0], torch.tensor(-0.5 * (12 / 8) ** 0.5 * 2))
    params[0].grad = None
    params[1].grad = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    assert torch.allclose(params[1], torch.tensor(-0.25, dtype=torch.float64))


def test_gradient_release_has_no_sums_of_the_whole_model() -> None:
    with pytest.raises(RuntimeError, match="needs the gradients of all"):
        triton_optim.enable_gradient_release(Whole([Parameter(torch.zeros(3))]))


@jit
def scaled_sums(p, g, momentum, h):
    return (h.scale * g,)


class Remembering(RuleOptimizer):
    """Steps as long as a number that it keeps, and doubles in each."""

    rule, measure, states = scaled, scaled_sums, (State("momentum"),)
    kept_states = (State("size", lambda p, _: torch.ones((), dtype=torch.float64, device=p.device)),)

    def __init__(self, params: Any, lr: float = 0.5, **options: Any) -> None:
        self.seen: list[Any] = []
        super().__init__(params, {"lr": lr}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], float("nan"))

    def kept_scalars(self, measured: Measured) -> dict[str, Any]:
        assert measured.sums == ()
        return {"scale": measured.states[0]["size"].clone()}

    def factors(self, measured: Measured) -> dict[str, Any]:
        self.seen.append((float(measured.h.scale), measured.sums[0].tolist()))
        for state in measured.states:
            state["size"].mul_(2)
        return {}


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"max_grad_norm": 1e9}], ids=str)
def test_scalars_of_what_is_kept(backend: str, options: dict[str, Any]) -> None:
    """The measure reads them, and the rule does; and what is kept is of the device, whether the step is counted there
    or not.
    """
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(2))]
    optimizer = Remembering([{"params": params[:1]}, {"params": params[1:], "lr": 0.25}], backend=backend, **options)
    for scale in (1.0, 2.0, 4.0):
        optimizer.seen.clear()
        for p in params:
            p.grad = torch.full_like(p, 3.0)
        optimizer.step()
        assert sorted(optimizer.seen) == [(scale, [scale * 6]), (scale, [scale * 9])]
    moved = 3 * 1 + 6 * 2 + 9 * 4
    assert params[0].tolist() == [-0.5 * moved] * 3
    assert params[1].tolist() == [-0.25 * moved] * 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            {"size": 1.0},
            r"kept_scalars returned \['size'\]; return a dict whose keys are scalars of the rule: lr, scale",
        ),
        (
            {"scale": torch.ones(2)},
            r"kept_scalars returned scale of shape \(2,\) for 2 parameters; return \(\), a number",
        ),
    ],
)
def test_kept_scalars_that_are_none(returned: Any, message: str) -> None:
    class Wrong(Remembering):
        def kept_scalars(self, measured: Measured) -> dict[str, Any]:
            return returned  # type: ignore[no-any-return]

    params = [Parameter(torch.ones(2)), Parameter(torch.ones(4))]
    optimizer = Wrong(params, backend="eager")
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert all(p.eq(1).all() for p in params)


def test_gradients_that_are_released_one_by_one(backend: str) -> None:
    ends = []
    for released in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
        optimizer = Measuring(model.parameters(), backend=backend)
        if released:
            triton_optim.enable_gradient_release(optimizer)
        for _ in range(2):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


def wrong(returned: Any) -> Any:
    class Wrong(Measuring):
        def factors(self, measured: Measured) -> dict[str, Any]:
            return returned  # type: ignore[no-any-return]

    return Wrong


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"rate": 1.0}, r"returned \['rate'\]; return a dict whose keys are scalars of the rule: lr, scale"),
        (torch.ones(2), "return a dict whose keys"),
        ({"scale": torch.ones(3)}, r"scale of shape \(3,\) for 2 parameters; return \(2,\)"),
    ],
)
def test_factors_that_are_none(returned: Any, message: str) -> None:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(4))]
    optimizer = wrong(returned)(params, backend="eager")
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert all(p.eq(1).all() for p in params)


def test_a_measure_without_factors() -> None:
    class Lacking(RuleOptimizer):
        rule, measure, states = scaled, sums, (State("momentum"),)

        def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
            return Scalars(0.1, 1.0)

    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = Lacking([p], {}, backend="eager")
    with pytest.raises(NotImplementedError, match="needs a method factors"):
        optimizer.step()


@jit
def nothing(p, g, momentum, h):
    return ()


@jit
def one(p, g, momentum, h):
    return p


@jit
def stateless(p, g, h):
    return (p,)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (nothing, "it must return a tuple of what is to be summed"),
        (one, "it must return a tuple"),
        (stateless, "takes 0 states, and its optimizer has 1"),
    ],
)
def test_measures_that_are_none(measure: Any, message: str) -> None:
    kind = type("Kind", (Measuring,), {"rule": scaled, "measure": measure})
    with pytest.raises(RuleError, match=message):
        kind([Parameter(torch.ones(2))])


def test_explain_and_memory() -> None:
    params = [Parameter(torch.ones(1000))]
    (plain,) = triton_optim.explain(triton_optim.AdamW(params, backend="cpp"))
    (own,) = triton_optim.explain(triton_optim.LAMB(params, backend="cpp"))
    assert (own.launches, plain.launches) == (2, 1)
    assert own.bytes_per_parameter == plain.bytes_per_parameter + 16  # p, g and two states are read once more
    (own,) = triton_optim.explain(triton_optim.NovoGrad(params, backend="cpp"))
    assert own.bytes_per_parameter == 5 * 4 + 4  # the gradient alone is
