"""NAdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adam import AdamScalars
from ..kernels.rules.nadamw import nadamw
from ..options import Options
from ..spec import State
from .adam import adam_scalars


class NAdamW(RuleOptimizer):
    r"""NAdamW as AlgoPerf has it: AdamW with Nesterov's momentum. (:class:`NAdam` has a schedule of momenta besides.)

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \frac{\gamma}{1 - \beta_1^t}
            \frac{\beta_1 m_t + (1 - \beta_1) g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

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
        >>> optimizer = triton_optim.NAdamW([p], lr=0.25, betas=(0.5, 0.99), weight_decay=0.0, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.6250, 0.6250])

    For: AdamW's place, with its settings; it is the baseline of both rulesets of AlgoPerf.

    Source: Dahl et al. 2023, the NAdamW baseline, https://arxiv.org/abs/2306.07179; after Dozat 2016, Algorithm 2,
    https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """

    rule = nadamw
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> AdamScalars:
        return adam_scalars(group, step, decoupled=True)
