"""Resilient backpropagation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.rprop import RpropScalars, rprop
from ..options import Options
from ..spec import State


def first_step_size(p: Tensor, group: dict[str, Any]) -> Any:
    """The learning rate; of a tensor the step size stays a function, for who differentiates."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    one = complex(1.0, 1.0) if p.is_complex() else 1.0
    return torch.full_like(p, one, memory_format=torch.preserve_format) * lr.reshape(())


class Rprop(RuleOptimizer):
    r"""Resilient backpropagation, with torch.optim.Rprop's arguments, defaults and state.

    Each element has a step size of its own, :math:`s_0 = \gamma`, that grows while its gradient keeps its sign:

    .. math::
        s_t &= s_{t-1} \begin{cases} \eta^+ & g_t g_{t-1} > 0 \\ \eta^- & g_t g_{t-1} < 0 \\ 1 & \text{else} \end{cases}
            \quad \text{between } s_{\min} \text{ and } s_{\max} \\
        g_t &= 0 \quad \text{where } g_t g_{t-1} < 0, \qquad p_t = p_{t-1} - s_t \operatorname{sign}(g_t)

    State of a parameter: ``step`` (0-dim float32), ``prev`` :math:`g`, ``step_size`` :math:`s`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`, the first step size; a number or a 1-element tensor.
        etas: :math:`(\eta^-, \eta^+)`, with :math:`0 < \eta^- < 1 < \eta^+`.
        step_sizes: :math:`(s_{\min}, s_{\max})`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Rprop([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['prev', 'step', 'step_size']

    For: Full batches alone: it reads the signs of gradients, which noise turns.

    Source: Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623, without its backtracking, as torch's.
    """

    rule = rprop
    states = (State("prev"), State("step_size", first_step_size, nonnegative=True))
    option_names = ("foreach", "maximize", "differentiable", "capturable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "etas": etas, "step_sizes": step_sizes}
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr")
        shrink, grow = group["etas"]
        if not 0.0 < shrink < 1.0 < grow:
            raise ValueError(f"Invalid eta values: {shrink}, {grow}. They must be 0 < etas[0] < 1 < etas[1].")

    def scalars(self, group: dict[str, Any], step: Any) -> RpropScalars:
        return RpropScalars(*group["etas"], *group["step_sizes"])
