"""Adam-atan2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adam_atan2 import AdamAtan2Scalars, adam_atan2
from ..options import Options
from ..spec import State


class AdamAtan2(RuleOptimizer):
    r"""Adam-atan2: AdamW with an angle in place of the quotient, so that it has no epsilon and scales of gradients do
    not matter, however small.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma a \operatorname{atan2}\!\left(\frac{m_t}{1 - \beta_1^t},
            b \sqrt{\frac{v_t}{1 - \beta_2^t}}\right)

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        a: :math:`a \ge 0`; 1.27 is about :math:`4 / \pi`, with which a gradient that never changes moves by lr.
        b: :math:`b \ge 0`: larger for updates nearer to Adam's.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.AdamAtan2([p], lr=0.5, a=1.0, backend="eager")
        >>> (1e-15 * p).sum().backward()
        >>> optimizer.step()  # by half of pi / 4
        >>> p.data
        tensor([0.6073, 0.6073])

    For: AdamW's place where gradients get as small as its epsilon, as in low precision and very large models.

    Source: Everett et al. 2024, https://arxiv.org/abs/2407.05872; the defaults, the decay and a and b as arguments are
    those of https://github.com/lucidrains/adam-atan2-pytorch.
    """

    rule = adam_atan2
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        a: float = 1.27,
        b: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "a": a, "b": b}
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "betas", "weight_decay")
        check_range("a", group["a"], 0.0)
        check_range("b", group["b"], 0.0)

    def scalars(self, group: dict[str, Any], step: Any) -> AdamAtan2Scalars:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        return AdamAtan2Scalars(
            keep=1 - lr * group["weight_decay"],
            step_size=lr * group["a"],
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            first=1 / (1 - beta1**step),
            second=group["b"] * (1 - beta2**step) ** -0.5,
        )
