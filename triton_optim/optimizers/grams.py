"""Grams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adam import AdamScalars
from ..kernels.rules.grams import grams
from ..options import Options
from ..spec import State
from .adam import adam_scalars


class Grams(RuleOptimizer):
    r"""Grams: the size of an update is AdamW's, its direction the gradient's.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \operatorname{sign}(g_t)
            \frac{\gamma}{1 - \beta_1^t} \frac{|m_t|}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Grams([p], lr=0.25, eps=0.0, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: A try beside cautious AdamW, to which it is close; no independent comparison has it yet.

    Source: Cao et al. 2024, Algorithm 1, https://arxiv.org/abs/2412.17107. The authors' code, with the same default,
    adds :math:`\epsilon` to :math:`\sqrt{v_t}` before the correction.
    """

    rule = grams
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> AdamScalars:
        return adam_scalars(group, step, decoupled=True)
