"""Adamax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adamax import AdamaxScalars, adamax
from ..options import OptionsAfterForeach
from ..spec import State


class Adamax(RuleOptimizer):
    r"""Adamax, with torch.optim.Adamax's arguments, defaults and state.

    With :math:`g_t` the gradient plus :math:`\lambda p_{t-1}`:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad u_t = \max(\beta_2 u_{t-1}, |g_t| + \epsilon) \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{u_t}

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_inf`` :math:`u`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, added to the gradient as :math:`\lambda p_{t-1}`.
        foreach, options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Adamax([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['exp_avg', 'exp_inf', 'step']

    For: Embeddings and others whose gradients are rarely large: the largest one counts, and is forgotten slowly.

    Source: Kingma & Ba 2015, Algorithm 2, https://arxiv.org/abs/1412.6980; :math:`\epsilon` is torch's.
    """

    rule = adamax
    states = (State("exp_avg"), State("exp_inf", nonnegative=True))
    option_names = ("foreach", "maximize", "differentiable", "capturable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        **options: Unpack[OptionsAfterForeach],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, foreach=foreach, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> AdamaxScalars:
        beta1, beta2 = group["betas"]
        return AdamaxScalars(
            l2=group["weight_decay"],
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            step_size=group["lr"] / (1 - beta1**step),
            eps=group["eps"],
        )
