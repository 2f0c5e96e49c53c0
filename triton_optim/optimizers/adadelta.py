"""Adadelta."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adadelta import AdadeltaScalars, adadelta
from ..options import OptionsAfterForeach
from ..spec import State


class Adadelta(RuleOptimizer):
    r"""Adadelta, with torch.optim.Adadelta's arguments, defaults and state.

    With :math:`g_t` the gradient plus :math:`\lambda p_{t-1}`:

    .. math::
        v_t &= \rho v_{t-1} + (1 - \rho) g_t^2, \qquad
        \Delta_t = \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g_t \\
        u_t &= \rho u_{t-1} + (1 - \rho) \Delta_t^2, \qquad p_t = p_{t-1} - \gamma \Delta_t

    State of a parameter: ``step`` (0-dim float32), ``square_avg`` :math:`v`, ``acc_delta`` :math:`u`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        rho: :math:`\rho`, in [0, 1].
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, added to the gradient as :math:`\lambda p_{t-1}`.
        foreach, options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Adadelta([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['acc_delta', 'square_avg', 'step']

    For: Results that were published with it; new work has no reason to begin here.

    Source: Zeiler 2012, Algorithm 1, https://arxiv.org/abs/1212.5701, with torch's learning rate.
    """

    rule = adadelta
    states = (State("square_avg", nonnegative=True), State("acc_delta", nonnegative=True))
    option_names = ("maximize", "capturable", "foreach", "differentiable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        **options: Unpack[OptionsAfterForeach],
    ) -> None:
        defaults = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, foreach=foreach, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "rho")
        if not group["rho"] <= 1:
            raise ValueError(f"Invalid rho value: {group['rho']}. It must be at least 0 and at most 1.")
        check_ranges(group, "eps", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> AdadeltaScalars:
        rho = group["rho"]
        return AdadeltaScalars(group["lr"], group["weight_decay"], rho, 1 - rho, group["eps"])
