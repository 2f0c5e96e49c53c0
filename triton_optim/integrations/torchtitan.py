"""torchtitan: its container of optimizers, with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer as TheirContainer

from ..core.optimizer import RuleOptimizer
from ..options import OF_ALL
from ..registry import rule_optimizers


class OptimizersContainer(TheirContainer):
    """torchtitan's ``OptimizersContainer``, in which ``optimizer_name`` is the name of an optimizer of triton_optim;
    another, such as ``"DistMuon"``, is torchtitan's own.

    ``optimizer_kwargs`` of a pattern takes all options. Those of the whole optimizer (``max_grad_norm``, ``amp``,
    ``backend``) must be the same in all patterns of one name, or stand in ``optimizer_factory_kwargs_by_name``.
    ``implementation="fused_opt_states_bf16"`` is ``state_dtype=torch.bfloat16``, with stochastic rounding.

    Raises:
        ValueError: the patterns of one optimizer have different options of the whole.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TheirContainer.Config):
        """As torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Any]:
        cls = rule_optimizers().get(name.lower())
        if cls is None:
            theirs: Callable[..., Any] = TheirContainer._resolve_optimizer_factory(name)
            return theirs
        made: Any = cls
        return lambda groups, **options: made(groups, **options_of_all(name, groups), **options)

    def _register_bf16_optimizer_state_hook(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups if isinstance(optimizer, RuleOptimizer) else ():
                group["state_dtype"] = torch.bfloat16
        super()._register_bf16_optimizer_state_hook()


def options_of_all(name: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The options of the whole optimizer that its groups have, taken out of them."""
    found: dict[str, Any] = {}
    for option in OF_ALL:
        values = [group.pop(option, None) for group in groups]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"the patterns of {name} have {option} {values}, and it is of the whole optimizer. Give all the same, "
                f'or optimizer_factory_kwargs_by_name={{"{name}": {{"{option}": ...}}}}.'
            )
        if values and values[0] is not None:
            found[option] = values[0]
    return found
