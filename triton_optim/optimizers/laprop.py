"""LaProp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.laprop import LaPropScalars, laprop
from ..options import Options
from ..spec import State


class LaProp(RuleOptimizer):
    r"""LaProp: gradients are divided by the root of the second moment first, and averaged then.

    The learning rate is within the mean, so that each gradient keeps the one of its step; :math:`c` corrects the bias:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
            m_t = \beta_1 m_{t-1} + (1 - \beta_1) \gamma_t \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        c_t &= \beta_1 c_{t-1} + (1 - \beta_1) \gamma_t, \qquad
            p_t = (1 - \gamma_t\lambda) \left(p_{t-1} - \frac{\gamma_t}{c_t} m_t\right)

    State of a parameter: ``step`` and ``exp_avg_lr`` :math:`c` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq``
    :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. 0 moves nothing.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.LaProp([p], lr=0.25, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Noisy gradients or a small second beta, with which Adam gets unstable.

    Source: Ziyin et al. 2020, Algorithm 1, https://arxiv.org/abs/2002.04839; the learning rate within the mean and a
    decay after the step are of the authors' code. There the decay is not multiplied by the learning rate, here it is,
    as AdamW's; and with a learning rate of 0 that code goes on by all of :math:`m`.
    """

    rule = laprop
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def init_scalar_state(self, group: dict[str, Any]) -> dict[str, float]:
        return {"exp_avg_lr": 0.0}

    def update_scalar_state(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, exp_avg_lr: Any
    ) -> dict[str, Any]:
        beta1 = group["betas"][0]
        return {"exp_avg_lr": beta1 * exp_avg_lr + (1 - beta1) * group["lr"]}

    def scalars(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, exp_avg_lr: Any
    ) -> LaPropScalars:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        mean = beta1 * exp_avg_lr + (1 - beta1) * lr
        return LaPropScalars(
            keep=1 - lr * group["weight_decay"],
            beta1=beta1,
            gain=lr * (1 - beta1),
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            step_size=lr / (mean + (mean == 0) * 1.0),  # where all were 0, 0
            correction=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )
