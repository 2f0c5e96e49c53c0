"""Lion with D-Adaptation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_positive, check_ranges
from ..core.optimizer import RuleOptimizer
from ..core.whole_model import DAdapts
from ..kernels.rules.dadapt import DAdaptLionScalars, dadapt_lion, dadapt_lion_sums
from ..options import Options
from ..spec import Measured, State


class DAdaptLion(DAdapts, RuleOptimizer):
    r"""Lion with D-Adaptation, which finds the step size from how far the updates agree with those before.

    With sums over the whole model, :math:`\eta_t = d_{t-1} \gamma` and :math:`\beta_3 = \sqrt{\beta_2}`:

    .. math::
        u_t &= \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad
            m_t = \beta_2 m_{t-1} + (1 - \beta_2) \eta_t g_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) \eta_t \langle u_t, s_{t-1} \rangle, \qquad
            s_t = \beta_3 s_{t-1} + (1 - \beta_3) \eta_t u_t \\
        d_t &= \max\Bigl(d_{t-1}, \frac{n_t}{(1 - \beta_3) \lVert s_t \rVert_1}\Bigr), \qquad
            p_t = (1 - \eta_t \lambda) p_{t-1} - \eta_t u_t

    Leave ``lr`` at 1 and let a schedule multiply it. Parameters whose ``lr`` is 0 stand still, and so do their states;
    the estimate is of the others. While all updates are 0, nothing is estimated.

    State of a parameter: ``exp_avg`` :math:`m` and ``s``, like the parameter; and of the whole model, each 0-dim and
    float64 where the device has it: ``d`` and ``numerator_weighted`` :math:`n`. The property ``d`` is the estimate, on
    the device.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        d0: the first estimate, positive.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = triton_optim.DAdaptLion([p], d0=0.25, backend="eager")
        >>> p.square().sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([2.7500])

    For: Lion's place, without a learning rate to tune.

    Source: the authors' code, https://github.com/facebookresearch/dadaptation, of Defazio and Mishchenko 2023,
    https://arxiv.org/abs/2301.07733. There a group whose ``lr`` is 0 moves by the largest ``lr`` of all.
    """

    rule = dadapt_lion
    measure = dadapt_lion_sums
    states = (State("exp_avg"), State("s"))
    counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "d0": d0}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "betas", "weight_decay")
        check_positive("d0", group["d0"])

    def scalars(self, group: dict[str, Any], step: Any) -> DAdaptLionScalars:
        """As they are where d is 1."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        beta3, moves = beta2**0.5, (lr > 0) * 1.0
        return DAdaptLionScalars(
            fade=-lr * group["weight_decay"],
            step_size=lr,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=moves * beta2 + (1 - moves),
            one_minus_beta2=lr * (1 - beta2),
            beta3=moves * beta3 + (1 - moves),
            share=lr * (1 - beta3),
            weight=lr,
            counts=moves,
            decay=beta3,
            growth_rate=math.inf,
        )

    def kept_scalars(self, measured: Measured) -> dict[str, Any]:
        d, _ = self.kept_numbers(measured)
        return {
            name: getattr(measured.h, name) * d for name in ("fade", "step_size", "one_minus_beta2", "share", "weight")
        }
