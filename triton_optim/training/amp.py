"""A gradient scaler that leaves looking for infinities to the optimizer's own pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from ..core.optimizer import RuleOptimizer


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler``, without its pass over the gradients before an optimizer with ``amp="fused"``.

    torch's looks for infinities by reading and writing all gradients, whoever unscales them. Here the optimizer looks,
    in the one pass that finds their norm. All else is torch's, other optimizers and arguments among it.

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = triton_optim.SGD(model.parameters(), lr=0.1, amp="fused", max_grad_norm=1.0)
        >>> scaler = triton_optim.GradScaler("cpu", init_scale=8.0)
        >>> scaler.scale(model(torch.full((1, 2), float("inf"))).sum()).backward()
        >>> scaler.step(optimizer)  # skipped
        >>> scaler.update()
        >>> scaler.get_scale()
        4.0
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """As torch's."""
        if not self._enabled or not isinstance(optimizer, RuleOptimizer) or optimizer.amp is None or args or kwargs:
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:
            return super().step(optimizer)
        scale, _ = self._check_scale_growth_tracker("step")
        optimizer.grad_scale = scale * getattr(optimizer, "grad_scale", 1)  # the caller's own, besides, as in torch
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale
        found = optimizer.skipped
        assert found is not None
        state["found_inf_per_device"] = {found.device: found.to(torch.float32)}
        state["stage"] = OptState.STEPPED
        return None
