"""Registries and containers of trainers: timm's, torchtitan's; with small stand-ins for these."""

import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from complaints import explains
from trainers import stand_in

import triton_optim as to


@dataclass
class OptimInfo:
    name: str
    opt_class: Any
    description: str
    has_eps: bool
    has_momentum: bool
    has_betas: bool
    num_betas: int
    defaults: Any


def test_timm_is_told_of_every_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, OptimInfo] = {}
    registry = types.SimpleNamespace(register=lambda info: known.update({info.name: info}))
    modules = {"timm.optim": {"OptimInfo": OptimInfo}, "timm.optim._optim_factory": {"default_registry": registry}}
    names = stand_in(monkeypatch, "timm", modules).register_optimizers()
    assert names == [*known]
    assert {"tritonadamw", "tritonmuon", "tritonlion", "tritonschedulefreeadamw"} <= known.keys()
    assert not any("_" in name for name in known)  # timm reads what is after it
    adamw, sgd, adan = (known[f"triton{name}"] for name in ("adamw", "sgd", "adan"))
    assert (adamw.opt_class, adamw.has_betas, adamw.has_momentum, adamw.num_betas) == (to.AdamW, True, False, 2)
    assert (sgd.has_momentum, sgd.has_eps, sgd.defaults, adan.num_betas) == (True, False, {"nesterov": True}, 3)
    matrix, head, bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 3), (2, 3), (3,)))
    groups = [{"params": [matrix, bias], "lr_scale": 0.5}, {"params": [head], "use_fallback": True}]
    muon = known["tritonmuon"].opt_class(groups, adamw={"lr": 1e-3}, lr=0.02, weight_decay=0.0)
    shown = [({id(p) for p in g["params"]}, g["lr"], g.get("use_muon", True)) for g in muon.param_groups]
    assert shown == [({id(matrix)}, 0.02, True), ({id(bias)}, 1e-3, False), ({id(head)}, 1e-3, False)]
    assert [g.get("lr_scale") for g in muon.param_groups] == [0.5, 0.5, None]
    assert len(known["tritonmuon"].opt_class([matrix, bias], lr=0.02).param_groups) == 2


class TheirContainer:
    """torchtitan's (0.3), as far as optimizers are made."""

    @dataclass(kw_only=True)
    class Config:
        implementation: str = "fused"

    def __init__(self, name: str, groups: list[dict[str, Any]], **options: Any) -> None:
        self.optimizers = [self._resolve_optimizer_factory(name)(groups, **options)]
        self.hooked = False

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        if name != "DistMuon":
            raise NotImplementedError(name)
        return torch.optim.SGD

    def _register_bf16_optimizer_state_hook(self) -> None:
        self.hooked = True


def test_torchtitans_container_makes_our_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"torchtitan.components.optimizer": {"OptimizersContainer": TheirContainer}}
    made = stand_in(monkeypatch, "torchtitan", modules).OptimizersContainer
    p = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]

    def groups(*options: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"params": [each], "lr": 0.1, **own} for each, own in zip(p, options, strict=True)]

    limit: dict[str, Any] = {"max_grad_norm": 0.5, "backend": "eager"}
    container = made("AdamW", groups({**limit, "weight_decay": 0.0}, limit))
    (optimizer,) = container.optimizers
    assert type(optimizer) is to.AdamW
    assert (optimizer.max_grad_norm, optimizer.backend) == (0.5, "eager")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1e-2]
    assert made("AdamW", groups({}, {}), max_grad_norm=2.0).optimizers[0].max_grad_norm == 2.0
    container._register_bf16_optimizer_state_hook()
    assert container.hooked
    for each in p:
        each.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[p[0]]["exp_avg"].dtype == torch.bfloat16
    assert type(made("DistMuon", groups({}, {})).optimizers[0]) is torch.optim.SGD
    with pytest.raises(NotImplementedError):
        made("Adamm", groups({}, {}))
    with pytest.raises(ValueError, match="patterns of AdamW have max_grad_norm") as error:
        made("AdamW", groups(limit, {"backend": "eager"}))
    explains(error, "[0.5, None]", "optimizer_factory_kwargs_by_name")
