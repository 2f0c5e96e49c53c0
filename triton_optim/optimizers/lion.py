"""Lion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.lion import LionScalars, lion
from ..options import Options
from ..spec import State


class Lion(RuleOptimizer):
    r"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma \operatorname{sign}(c_t)

    State of a parameter: ``exp_avg`` :math:`m`, like the parameter. As torch.sign, the
    sign of NaN is 0: a NaN gradient stays in ``exp_avg`` and leaves the parameter to its decay.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. A tenth to a third of AdamW's is usual.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1); numbers or 1-element tensors.
        weight_decay: :math:`\lambda \ge 0`; three to ten times AdamW's is usual.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Lion([p], lr=0.25, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Large batches, in half of AdamW's state; of small ones the sign is mostly noise.

    Source: Chen et al. 2023, Algorithm 2, https://arxiv.org/abs/2302.06675.
    """

    rule = lion
    states = (State("exp_avg"),)
    counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> LionScalars:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        return LionScalars(
            lr=lr,
            keep=1 - lr * group["weight_decay"],
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
        )
