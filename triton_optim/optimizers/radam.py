"""RAdam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.radam import RAdamScalars, radam
from ..options import Options
from ..spec import State


class RAdam(RuleOptimizer):
    r"""RAdam, with torch.optim.RAdam's arguments, defaults and state.

    With :math:`g_t` the gradient (plus :math:`\lambda p_{t-1}`, unless the decay is decoupled):

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}} \\
        p_t &= p_{t-1} - \frac{\gamma m_t}{1 - \beta_1^t}
            \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    Decoupled decay multiplies :math:`p_{t-1}` by :math:`1 - \gamma\lambda` first.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        decoupled_weight_decay: decay the parameter, not the gradient.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.RAdam([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['exp_avg', 'exp_avg_sq', 'step']

    For: Adam's place where it diverges in its first steps and a warm-up is not to be tuned.

    Source: Liu et al. 2020, Algorithm 2, https://arxiv.org/abs/1908.03265; torch rectifies from 5 on, the paper from 4.
    """

    rule = radam
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))
    option_names = ("maximize", "foreach", "capturable", "differentiable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> RAdamScalars:
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        decoupled = group["decoupled_weight_decay"]
        step_size = lr / (1 - beta1**step)
        rectified = rectification(beta2, step) * (1 - beta2**step) ** 0.5
        plain = rectified == 0
        return RAdamScalars(
            l2=0.0 if decoupled else decay,
            keep=1 - lr * decay if decoupled else 1.0,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            plain_step=step_size * plain,
            adaptive_step=step_size * rectified,
            eps=group["eps"] + 1.0 * plain,  # of the quotient that is multiplied by 0 then, lest it be 0 / 0
        )


def rectification(beta2: Any, step: Any, shortest: float = 5.0) -> Any:
    """:math:`r_t`; 0 where the variance can't be told yet, of a mean that is no longer than `shortest`."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if isinstance(length, Tensor):
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return torch.where(length > shortest, square, 0.0).sqrt()
    if length <= shortest:
        return 0.0
    return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
