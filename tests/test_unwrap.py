"""What trainers wrap optimizers and models in is seen through."""

from typing import Any

import pytest
import torch
from complaints import explains

import triton_optim as to
from triton_optim.integrations import unwrap_model, unwrap_optimizer


class Accelerated(torch.optim.Optimizer):
    """As accelerate's: knows a few methods, and is no optimizer of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)


class Lightnings:
    """As Lightning's, of Trainer and Fabric: an object of a class made of this one and of that of the optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type(f"Lightning{type(optimizer).__name__}", (self.__class__, type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Zeros:
    """As ZeroRedundancyOptimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optim = optimizer


WAYS: list[Any] = [Accelerated, Lightnings, Zeros, lambda optimizer: Accelerated(Lightnings(optimizer))]
each_way = pytest.mark.parametrize("wrap", WAYS, ids=["accelerate", "Lightning", "ZeRO", "two"])


def trained(**options: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = to.AdamW(model.parameters(), lr=0.1, backend="eager", **options)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: Any) -> None:
    model.zero_grad()
    model(torch.ones(1, 4)).square().sum().backward()
    optimizer.step()


@each_way
def test_functions_of_an_optimizer_take_what_is_around_it(wrap: Any) -> None:
    model, optimizer = trained(ema_decay=0.5)
    wrapped = wrap(optimizer)
    assert unwrap_optimizer(wrapped) is unwrap_optimizer(optimizer) is optimizer
    assert repr(to.explain(wrapped)) == repr(to.explain(optimizer))
    assert to.memory_report(wrapped) == to.memory_report(optimizer)
    saved = to.to_torch_state_dict(wrapped)
    torch.testing.assert_close(saved["state"], to.to_torch_state_dict(optimizer)["state"])
    to.load_torch_state_dict(wrapped, saved)
    theirs = {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    state = {"step": 5, "state1": torch.ones(3), "state2": torch.ones(3)}  # as bitsandbytes has it
    foreign = {"state": {1: state}, "param_groups": [theirs]}
    assert repr(to.convert_state_dict(wrapped, foreign)) == repr(to.convert_state_dict(optimizer, foreign))
    weights = to.master_state_dict(model, wrapped)
    to.load_master_state_dict(model, wrapped, weights)
    handle = to.enable_gradient_release(wrapped)
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad is None
    optimizer.step()
    handle.remove()
    unwrap_optimizer(wrapped).eval()
    assert not optimizer.training


def test_what_is_set_on_lightnings_wrapper_reaches_the_optimizer() -> None:
    model, optimizer = trained(max_grad_norm=1.0, ema_decay=0.5)
    wrapped: Any = Lightnings(optimizer)
    wrapped.max_grad_norm = 0.25
    assert optimizer.max_grad_norm == wrapped.max_grad_norm == 0.25
    step(model, wrapped)
    assert torch.equal(wrapped.grad_norm, optimizer.grad_norm)
    with pytest.raises(ValueError, match="max_grad_norm"):
        wrapped.max_grad_norm = -1.0
    weights = model.weight.detach().clone()
    with wrapped.averaged_parameters(), pytest.raises(RuntimeError, match="step inside averaged_parameters"):
        wrapped.step()
    wrapped.eval()
    assert not torch.equal(model.weight, weights)
    assert not optimizer.training
    optimizer.train()
    assert torch.equal(model.weight, weights)
    assert wrapped.training


def test_what_has_none_inside() -> None:
    theirs = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for wrapped in (theirs, Accelerated(theirs), 3, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="needs an optimizer of triton_optim") as error:
            to.explain(wrapped)  # type: ignore[arg-type]
        explains(error, type(wrapped).__qualname__)
    with pytest.raises(TypeError, match=r"test_unwrap\.Accelerated > torch\.optim\.sgd\.SGD"):
        unwrap_optimizer(Accelerated(theirs))
    around = Accelerated(None)
    around.optimizer = around
    with pytest.raises(TypeError):
        unwrap_optimizer(around)
    with pytest.raises(TypeError, match="LBFGS"):
        to.memory_report(to.LBFGS([torch.zeros(1)]))


class _FabricModule(torch.nn.Module):
    """As Lightning Fabric's."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._forward_module = module

    @property
    def module(self) -> torch.nn.Module:
        return self._forward_module


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [torch.nn.DataParallel, compiled, _FabricModule, lambda model: compiled(_FabricModule(model))],
    ids=["DataParallel", "compile", "Fabric", "two"],
)
def test_functions_of_a_model_take_what_is_around_it(wrap: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).to(torch.bfloat16)
    wrapped = wrap(model)
    assert unwrap_model(wrapped) is unwrap_model(model) is model
    groups = to.muon_param_groups(wrapped, heads=["1"])
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(model[0].weight)],
        [id(p) for p in (model[0].bias, model[1].weight, model[1].bias)],
    ]
    assert len(to.mup_param_groups(wrapped, model, lr=0.1)) == len(to.mup_param_groups(model, wrapped, lr=0.1)) == 1
    optimizer = to.SGD(wrapped.parameters(), lr=0.1, param_precision="split32", backend="eager")
    weights = to.master_state_dict(wrapped, optimizer)
    assert weights.keys() == model.state_dict().keys()
    to.load_master_state_dict(wrapped, optimizer, weights)


def test_a_models_own_module_stays() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.Linear(1, 1)

    own = Own()
    assert unwrap_model(own) is own
