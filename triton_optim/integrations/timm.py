"""timm: our optimizers by name in ``create_optimizer_v2`` and in its ``train.py --opt``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from ..optimizers.matrix.muon import Muon
from ..registry import rule_optimizers


def register_optimizers() -> list[str]:
    """Make the optimizers of triton_optim known to timm: ``"tritonadamw"``, and so on.

    timm cuts names at underscores. As for its own, momentum is 0.9 unless it is given, and SGD has Nesterov's. Muon,
    and what is made of it, gives AdamW what ``fallback_list`` names and all that has not two dimensions, with the
    options ``adamw``: ``create_optimizer_v2(model, "tritonmuon", lr=0.02, adamw={"lr": 1e-3})``.

    Returns:
        The names.
    """
    names = []
    for own, cls in rule_optimizers().items():
        arguments, name = inspect.signature(cls).parameters, f"triton{own}"
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=Hybrid(cls) if issubclass(cls, Muon) else cls,
                description=f"triton_optim.{cls.__name__}",
                has_eps="eps" in arguments,
                has_momentum="momentum" in arguments,
                has_betas="betas" in arguments,
                num_betas=len(arguments["betas"].default) if "betas" in arguments else 2,
                defaults={"nesterov": True} if cls.__name__ == "SGD" else None,
            )
        )
        names.append(name)
    return names


class Hybrid:
    """Makes Muon of timm's groups."""

    def __init__(self, cls: type[Muon]) -> None:
        self._cls = cls

    def __call__(self, params: Iterable[Any], adamw: dict[str, Any] | None = None, **options: Any) -> Muon:
        """Of each group, what Muon takes, and what AdamW takes, with the learning rate of `adamw`."""
        given = list(params)
        groups: list[dict[str, Any]] = []
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            own = dict(group)
            falls_back, members = own.pop("use_fallback", False), list(own.pop("params"))
            matrices = [p for p in members if p.dim() == 2 and not falls_back]
            rest = [p for p in members if p.dim() != 2 or falls_back]
            groups += [{**own, "params": matrices}] if matrices else []
            groups += [{**own, "use_muon": False, **(adamw or {}), "params": rest}] if rest else []
        return self._cls(groups, **options)
