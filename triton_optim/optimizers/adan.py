"""Adan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_betas, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adan import AdanScalars, adan
from ..options import Options
from ..spec import State


class Adan(RuleOptimizer):
    r"""Adan: Adam with Nesterov's momentum, which it takes from the difference of two gradients.

    With :math:`d_t = g_t - g_{t-1}`, which is 0 in the first step, and :math:`\hat x_t = x_t / (1 - \beta^t)`:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2 \\
        p_t &= \frac{1}{1 + \gamma\lambda}
            \left(p_{t-1} - \gamma \frac{\hat m_t + \beta_2 \hat v_t}{\sqrt{\hat n_t} + \epsilon}\right)

    With ``no_prox`` the decay comes before the step: :math:`(1 - \gamma\lambda) p_{t-1} - \gamma \dots`

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_diff`` :math:`v`, ``exp_avg_sq``
    :math:`n`, ``previous_grad`` :math:`g_t`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1); the paper's are 1 less these.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        no_prox: decay before the step instead of the paper's proximal decay.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Adan([p], lr=0.25, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Vision and diffusion models at large learning rates, if there is memory for two states more than Adam's.

    Source: Xie et al. 2022, Algorithm 1, https://arxiv.org/abs/2208.06677; the bias corrections and ``no_prox`` are of
    the authors' code, which starts from zeros.
    """

    rule = adan
    states = (State("exp_avg"), State("exp_avg_diff"), State("exp_avg_sq", nonnegative=True), State("previous_grad"))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox}
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "weight_decay")
        check_betas(group["betas"], 3)

    def scalars(self, group: dict[str, Any], step: Any) -> AdanScalars:
        lr, decay, (beta1, beta2, beta3) = group["lr"], group["weight_decay"], group["betas"]
        return AdanScalars(
            later=(step > 1) * 1.0,
            keep=1 - lr * decay if group["no_prox"] else 1.0,
            shrink=1.0 if group["no_prox"] else 1 / (1 + lr * decay),
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            beta3=beta3,
            one_minus_beta3=1 - beta3,
            step_size=lr / (1 - beta1**step),
            diff_step=lr * beta2 / (1 - beta2**step),
            correction=(1 - beta3**step) ** -0.5,
            eps=group["eps"],
        )
