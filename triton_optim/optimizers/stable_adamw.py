"""StableAdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.stable_adamw import StableAdamWScalars, stable_adamw, stable_adamw_ratio
from ..options import Options
from ..spec import Measured, State


class StableAdamW(RuleOptimizer):
    r"""StableAdamW: AdamW that takes a shorter step where gradients are larger than their second moment knows, by
    Adafactor's clipping of updates.

    With :math:`\hat\beta = \beta (1 - \beta^{t-1}) / (1 - \beta^t)`, and a mean over the parameter:

    .. math::
        m_t &= \hat\beta_1 m_{t-1} + (1 - \hat\beta_1) g_t, \qquad
        v_t = \hat\beta_2 v_{t-1} + (1 - \hat\beta_2) g_t^2 \\
        \gamma_t &= \gamma \big/ \max\left(1, \sqrt{\operatorname{mean} \frac{g_t^2}{\max(v_t, \epsilon^2)}}\right) \\
        p_t &= (1 - \gamma_t \lambda) p_{t-1} - \gamma_t \frac{m_t}{\sqrt{v_t} + \epsilon}

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`; neither needs a
    correction.

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
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = triton_optim.StableAdamW([p], lr=0.1, weight_decay=0.0, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.9000, 0.9000, 0.9000])

    For: Loss spikes of large models, in the place of AdamW with a clipped norm of the gradients.

    Source: Wortsman et al. 2023, Algorithm 2, https://arxiv.org/abs/2304.13013.
    """

    rule = stable_adamw
    measure = stable_adamw_ratio
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> StableAdamWScalars:
        lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
        beta1, beta2 = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in group["betas"])
        return StableAdamWScalars(
            lr=lr,
            keep=1 - lr * decay,
            weight_decay=decay,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=eps,
            eps_sq=eps * eps,
        )

    def factors(self, measured: Measured) -> dict[str, Any]:
        (ratios,), h = measured.sums, measured.h
        rms = (ratios / measured.numel.clamp(min=1)).sqrt()
        lr = h.lr / rms.clamp(min=1)
        return {"lr": lr, "keep": 1 - lr * h.weight_decay}
