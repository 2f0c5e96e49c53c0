"""Beside torch.optim: PyTorch's own table of inputs and errors, signatures, groups, states, checkpoints."""

import copy
import inspect
from functools import cache
from typing import Any

import pytest
import torch
from side_by_side import assert_same, backward, train
from table import CASES, Case, rows
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.registry import optimizers

PEERS = {case.name: case for case in CASES if case.torchs is not None}
CLOSURE_DRIVEN = {"LBFGS"}
OURS = {name: getattr(triton_optim, name) for name in torch.optim.__all__ if name.lower() in optimizers()}

each_name = pytest.mark.parametrize("name", sorted(OURS))
each_peer = rows(*PEERS.values())


@cache
def info() -> dict[str, Any]:
    """PyTorch's table, whose import takes seconds: not where tests are only collected."""
    from torch.testing._internal.common_optimizers import optim_db

    return {info.optim_cls.__name__: info for info in optim_db}


def test_every_optimizer_of_pytorchs_table_is_tried() -> None:
    assert OURS.keys() == {name for name in info() if hasattr(triton_optim, name)}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Parameter, Parameter, Tensor]:
    torch.manual_seed(0)
    return (
        Parameter(torch.randn(10, 5, dtype=dtype)),
        Parameter(torch.randn(10, dtype=dtype)),
        torch.randn(5, dtype=dtype),
    )


def without(kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def trained(cls: type, kwargs: dict[str, Any], steps: int = 6, **more: Any) -> list[Tensor]:
    weight, bias, x = problem()
    kwargs = copy.deepcopy(kwargs)
    case = PEERS.get(cls.__name__)
    params = [weight] if case is not None and case.matrices else [weight, bias]
    optimizer = cls(params, **kwargs, **more)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        if kwargs.get("maximize"):
            loss = -loss
        if case is None:
            loss.backward()
        else:
            backward(case, loss, params)
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return [weight.detach(), bias.detach()]


@each_name
def test_inputs_of_pytorchs_own_tests(name: str) -> None:
    """Every configuration that PyTorch tests, eagerly and as it would be chosen."""
    for given in info()[name].optim_inputs_func(device="cpu"):
        # capturable is for devices: torch refuses it on a CPU.
        theirs = trained(getattr(torch.optim, name), without(given.kwargs, "capturable"))
        alone = name in CLOSURE_DRIVEN or PEERS[name].sparse
        backends = [{}] if alone else [{"backend": "eager"}, {"backend": "triton"}]
        for more in backends:
            ours = trained(OURS[name], given.kwargs, **more)
            for a, b in zip(ours, theirs, strict=True):
                # Carried numbers are float32 in both, and rounded at different places.
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, d=given.desc: f"{d}: {m}")


@each_name
def test_error_inputs_of_pytorchs_own_tests(name: str) -> None:
    found = 0
    for error in info()[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        if "CONSTRUCTION" in str(error.error_on):
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[name](given.params, **given.kwargs)
            found += 1
        else:
            optimizer = OURS[name](given.params, **given.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                optimizer.step()
            found += 1
    assert found


@each_peer
def test_signature_begins_as_torchs(case: Case) -> None:
    ours = inspect.signature(case.ours).parameters
    theirs = inspect.signature(case.torchs).parameters
    positional = [n for n, a in theirs.items() if a.kind is a.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for name, argument in theirs.items():
        assert ours[name].default == argument.default, name
        assert ours[name].kind == argument.kind, name


@each_peer
def test_groups_and_states_are_torchs(case: Case) -> None:
    for options in case.variants.values():
        ours, theirs = (cls(case.parameters(), **options) for cls in (case.ours, case.torchs))
        assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
        before = [{i: list(state) for i, state in o.state_dict()["state"].items()} for o in (ours, theirs)]
        assert before[0] == before[1]
        for optimizer in (ours, theirs):
            train(case, [0], (optimizer.param_groups[0]["params"], optimizer))
        for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            a, b = ours.state.get(p, {}), theirs.state.get(q, {})
            assert a.keys() == {name for name, value in b.items() if value is not None}
            for name, value in a.items():
                if isinstance(b[name], Tensor):
                    assert (value.dtype, value.shape, value.device) == (b[name].dtype, b[name].shape, b[name].device)
                else:
                    assert (type(value), value) == (type(b[name]), b[name])


@each_peer
def test_checkpoints_move_both_ways_in_mid_training(case: Case) -> None:
    for options in case.variants.values():
        ends = {}
        for first, second in ((case.torchs, case.torchs), (case.ours, case.torchs), (case.torchs, case.ours)):
            params = case.parameters(dtype=torch.float64)
            # What runs the steps is not the question, and compiling for each variant takes seconds.
            optimizer = first(params, **options, **({"backend": "eager"} if first is case.ours else {}))
            train(case, range(6), (params, optimizer))
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = second(params, **options, **({"backend": "eager"} if second is case.ours else {}))
            optimizer.load_state_dict(saved)
            train(case, range(6, 12), (params, optimizer))
            ends[first, second] = [p.detach() for p in params]
        plain = ends.pop((case.torchs, case.torchs))
        for moved in ends.values():
            torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-9)


@each_peer
def test_old_checkpoints_load(case: Case) -> None:
    """From before options had keys, and with ``step`` as a number."""
    params = case.parameters()
    optimizer = case.ours(params, backend="eager")
    train(case, [0], (params, optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    for option in ("foreach", "fused", "capturable", "differentiable", "maximize"):
        saved["param_groups"][0].pop(option, None)
    for state in saved["state"].values():
        for name in case.numbers.keys() & state.keys():
            state[name] = float(state[name]) if isinstance(state[name], Tensor) else state[name]
    twins = [Parameter(p.detach().clone()) for p in params]
    resumed = case.ours(twins, backend="eager")
    resumed.load_state_dict(saved)
    train(case, [1], (params, optimizer), (twins, resumed))
    assert_same(case, resumed, optimizer, rtol=0, atol=0)


@each_peer
def test_rosenbrock_and_a_quadratic_go_down(case: Case) -> None:
    def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    def quadratic(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x**2 + 10 * y**2)

    for loss, start in ((rosenbrock, [-1.2, 1.0]), (quadratic, [1.0, 1.0])):
        ends = []
        for cls in (case.ours, case.peer):
            p = Parameter(torch.tensor([start] if case.matrices else start, dtype=torch.float64))
            how = {"backend": "eager"} if cls is case.ours else {"foreach": False} if case.peer_takes("foreach") else {}
            optimizer = cls([p], lr=1e-3, **how)
            for _ in range(200):
                optimizer.zero_grad()
                backward(case, loss(*p.flatten()), [p])
                optimizer.step()
            ends.append(p.detach())
        assert loss(*ends[0].flatten()) < loss(*torch.tensor(start))
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-8)
