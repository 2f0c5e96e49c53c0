"""What torch's releases do differently: ours does what the newest does, and is held against the one installed."""

import copy
import inspect
from typing import Any

import pytest
import torch
from conftest import BACKENDS, TORCH
from torch.nn import Parameter

import triton_optim

since_215 = pytest.mark.skipif(TORCH < (2, 15), reason="torch does this from 2.15 on")


class Mine(triton_optim.RuleOptimizer):
    """A user's own, with a constructor of their own."""

    rule = triton_optim.SGD.variants[0].rule

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


# Parameters in a set

OURS = [getattr(triton_optim, n) for n in ("AdamW", "Adam", "SGD", "Lion", "Muon", "LBFGS", "NonlinearCG")]


@pytest.mark.parametrize("kind", [set, frozenset])
@pytest.mark.parametrize("cls", OURS)
def test_a_set_of_parameters_warns_at_the_line_that_gave_it(cls: type, kind: type) -> None:
    given = kind({Parameter(torch.ones(2, 2)), Parameter(torch.ones(1, 2))})
    with pytest.warns(FutureWarning, match="ordered collections") as caught:
        optimizer = cls(given)
    line = inspect.currentframe().f_lineno - 1
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert set(optimizer.param_groups[0]["params"]) == given


def test_a_subclass_is_pointed_at_where_it_passes_the_set_on() -> None:
    lines, first = inspect.getsourcelines(Mine.__init__)
    with pytest.warns(FutureWarning, match="ordered collections") as caught:
        Mine({Parameter(torch.ones(2))})
    assert (caught[0].filename, caught[0].lineno) == (__file__, first + len(lines) - 1)


@pytest.mark.parametrize("cls", OURS)
def test_what_has_an_order_does_not_warn(cls: type) -> None:
    p = Parameter(torch.ones(2, 2))
    for params in ([p], (p,), iter([p]), {p: None}.keys(), [("weight", p)], [{"params": [p]}]):
        cls(params)


@since_215
def test_torch_warns_of_a_set_too() -> None:
    with pytest.warns(FutureWarning, match="ordered collections"):
        torch.optim.AdamW({Parameter(torch.ones(2))})


# Ranges


@pytest.mark.parametrize("name", ["lambd", "alpha"])
@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_decay_and_power_of_asgd_are_not_negative(name: str, value: float) -> None:
    p = Parameter(torch.ones(2))
    triton_optim.ASGD([p], **{name: 0.0})
    with pytest.raises(ValueError, match=f"Invalid {name} value: {value}"):
        triton_optim.ASGD([p], **{name: value})
    if TORCH >= (2, 15):
        with pytest.raises(ValueError, match=f"Invalid {name} value: {value}"):
            torch.optim.ASGD([p], **{name: value})


# Muon


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (1, 9)])
def test_factors_of_muon_are_torchs(shape: tuple[int, int]) -> None:
    """Of each name that the installed torch knows; the new one goes below 1 for wide matrices."""
    rows, columns = shape
    factors = triton_optim.optimizers.matrix.muon.ADJUST
    for name, factor in factors.items():
        if name != "spectral_unclamped" or TORCH >= (2, 14):
            assert factor(*shape) == pytest.approx(torch.optim._muon._adjust_lr(1.0, name, torch.Size(shape)))
    assert factors["spectral_unclamped"](*shape) == pytest.approx((rows / columns) ** 0.5)


def test_spectral_unclamped_comes_from_a_checkpoint() -> None:
    ends = []
    for name in (None, "spectral_unclamped"):
        p = Parameter(torch.zeros(2, 8))
        optimizer = triton_optim.Muon([p], lr=1.0, backend="eager")
        saved = optimizer.state_dict()
        saved["param_groups"][0]["adjust_lr_fn"] = name
        optimizer.load_state_dict(saved)
        torch.manual_seed(0)
        p.grad = torch.randn(2, 8)
        optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], 0.5 * ends[0])


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_a_16_bit_matrix_is_the_average_of_its_gradients(nesterov: bool) -> None:
    """torch's, up to 2.14 and without Nesterov's, was overwritten by the iteration."""
    p, q = (Parameter(torch.ones(4, 6, dtype=torch.bfloat16)) for _ in range(2))
    ours = triton_optim.Muon([p], nesterov=nesterov, momentum=0.5, backend="eager")
    theirs = torch.optim.Muon([q], nesterov=nesterov, momentum=0.5)
    expected = torch.zeros(4, 6)
    for _ in range(3):
        p.grad = torch.randn(4, 6).bfloat16()
        q.grad = p.grad.clone()
        expected = 0.5 * expected + 0.5 * p.grad.float()
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.state[p]["momentum_buffer"].float(), expected, rtol=2e-2, atol=1e-2)
    if TORCH >= (2, 15):
        torch.testing.assert_close(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


# 16 bits on a CPU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values != ("compiled",)])
def test_16_bits_are_computed_in_float32(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """As torch's fused ones are from 2.14 on: of 100 elements, which are several full vectors and a tail."""
    start, g = torch.randn(100).to(dtype), torch.randn(100).to(dtype)
    exact = Parameter(start.double())
    exact.grad = g.double()
    getattr(torch.optim, name)([exact], lr=0.05, weight_decay=0.1).step()
    p = Parameter(start.to(device, copy=True))
    p.grad = g.to(device)
    getattr(triton_optim, name)([p], lr=0.05, weight_decay=0.1, backend=backend).step()
    # Rounded to the nearest once, at the end; the float32 before it may turn a tie.
    assert (p.detach().cpu() == exact.detach().to(dtype)).float().mean() >= 0.97
    torch.testing.assert_close(p.detach().cpu(), exact.detach().to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    if TORCH >= (2, 14) and device.type == "cpu":
        q = Parameter(start.clone())
        q.grad = g.clone()
        getattr(torch.optim, name)([q], lr=0.05, weight_decay=0.1, fused=True).step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2 * torch.finfo(dtype).eps, atol=0)


# The functions, which torch has made public


def functional_adamw(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> None:
    functions = torch.optim.functional if TORCH >= (2, 15) else torch.optim._functional
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sqs", "step")
    states = [[s[n] for s in map(optimizer.state.get, params) if n in s] for n in names]
    group = optimizer.param_groups[0]
    with torch.no_grad():
        functions.adamw(
            params, [p.grad for p in params], *states, foreach=False, amsgrad=False, maximize=False, lr=group["lr"],
            beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


def test_torchs_functions_take_our_states_and_we_go_on_with_theirs(backend: str, device: torch.device) -> None:
    """There are none of ours: they would have to find out anew, at every call, what an optimizer keeps."""
    ends = []
    for cls, more in ((triton_optim.AdamW, {"backend": backend}), (torch.optim.AdamW, {})):
        torch.manual_seed(1)
        params = [Parameter(torch.randn(shape).to(device)) for shape in ((4, 3), (5,))]
        optimizer = cls(params, lr=0.1, **more)
        for i in range(6):
            for p in params:
                p.grad = torch.randn(p.shape).to(device)
            if i in (1, 2, 4) and cls is triton_optim.AdamW:
                functional_adamw(optimizer, params)
            else:
                optimizer.step()
        assert [optimizer.state[p]["step"].item() for p in params] == [6, 6]
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends)


# Other parameters and states, for a while


def test_parameters_and_states_swapped_in_are_stepped_and_given_back() -> None:
    """torch.optim's context manager, which tracers use. The count is not written to the state that was given."""
    swapped = pytest.importorskip("torch.optim._stateless").swap_in_optimizer_params_and_state
    ends = []
    for cls, more in ((triton_optim.AdamW, {"backend": "eager"}), (torch.optim.AdamW, {})):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        optimizer = cls(model.parameters(), lr=0.1, **more)

        def step(params: Any, optimizer: Any = optimizer) -> None:
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()

        step(model.parameters())
        others = {name: torch.randn_like(p, requires_grad=True) for name, p in model.named_parameters()}
        given = copy.deepcopy(optimizer.state_dict())
        before = copy.deepcopy(given)
        with swapped(optimizer, others, given):
            step(others.values())
        torch.testing.assert_close(optimizer.state_dict(), before)
        step(model.parameters())
        moments = [{name: state[name] for name in ("exp_avg", "exp_avg_sq")} for state in given["state"].values()]
        ends.append((moments, [p.detach() for p in others.values()], [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*ends)
