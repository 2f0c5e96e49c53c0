"""ADOPT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adopt import ADOPTScalars, adopt
from ..options import Options
from ..spec import State


class ADOPT(RuleOptimizer):
    r"""ADOPT: Adam that converges with any :math:`\beta_2`, as no gradient is divided by a moment that holds it.

    The first step sets :math:`v_1 = g_1^2` and nothing else. From the second on, with :math:`g_t` the gradient (plus
    :math:`\lambda p_{t-1}`, unless the decay is decoupled), and :math:`c_t = (t - 1)^{e}`:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)
            \operatorname{clip}\left(\frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)}, -c_t, c_t\right) \\
        p_t &= p_{t-1} - \gamma m_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    Decoupled decay multiplies :math:`p_{t-1}` by :math:`1 - \gamma\lambda` first.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        clip_exp: :math:`e \ge 0`, the exponent of the bound; None for no clipping, the paper's first version.
        weight_decay: :math:`\lambda \ge 0`.
        decoupled_weight_decay: decay the parameter, not the gradient.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.ADOPT([p], lr=0.25, betas=(0.5, 0.99), backend="eager")
        >>> for _ in range(2):
        ...     p.grad = torch.ones(2)
        ...     optimizer.step()
        >>> p.data
        tensor([0.8750, 0.8750])

    For: Adam's place where it is unstable, or its second beta would have to be tuned.

    Source: Taniguchi et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.02853; the clipping and both decays are of
    the authors' code.
    """

    rule = adopt
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exp: float | None = 0.25,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_exp": clip_exp,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")
        if group["clip_exp"] is not None:
            check_ranges(group, "clip_exp")

    def scalars(self, group: dict[str, Any], step: Any) -> ADOPTScalars:
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        decoupled, clip_exp = group["decoupled_weight_decay"], group["clip_exp"]
        later = (step > 1) * 1.0
        return ADOPTScalars(
            later=later,
            l2=0.0 if decoupled else decay,
            keep=1 - lr * decay if decoupled else 1.0,
            lr=lr,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=later * beta2,
            one_minus_beta2=1 - later * beta2,
            clip=float("inf") if clip_exp is None else (step - 1) ** clip_exp,
            eps=group["eps"],
        )
