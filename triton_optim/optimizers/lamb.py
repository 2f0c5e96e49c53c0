"""LAMB."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.lamb import LambScalars, lamb, lamb_norms
from ..options import Options
from ..spec import Measured, Variant
from ..util.trust import trust_ratio
from .adam import MOMENTS


class LAMB(RuleOptimizer):
    r"""LAMB: Adam's update with decay, made as long as the parameter is: for large batches.

    With :math:`\hat m_t = m_t / (1 - \beta_1^t)`, :math:`\hat v_t = v_t / (1 - \beta_2^t)` and norms over a parameter:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} + \lambda p_{t-1}, \qquad
        p_t = p_{t-1} - \gamma \frac{\lVert p_{t-1} \rVert}{\lVert u_t \rVert} u_t

    The ratio is 1 where one of the norms is 0, and for groups with ``trust_ratio=False``: biases and the scales of
    norms are best put in one of these, with no decay.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        trust_ratio: whether updates are made as long as their parameters.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = triton_optim.LAMB([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()  # by a tenth of the norm, 5
        >>> print(f"{(p.detach() - torch.tensor([3.0, 4.0])).norm():.4f}")
        0.5000

    For: Batches of many thousands, in AdamW's place, as BERT was trained.

    Source: You et al. 2020, Algorithm 2, https://arxiv.org/abs/1904.00962, whose :math:`\phi` is left out, as in its
    experiments.
    """

    variants = (Variant(lamb, MOMENTS, measure=lamb_norms), Variant(lamb, MOMENTS))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust_ratio: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust_ratio": trust_ratio}
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> LambScalars:
        beta1, beta2 = group["betas"]
        return LambScalars(
            lr=group["lr"],
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            first=1 / (1 - beta1**step),
            second=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def variant(self, group: dict[str, Any]) -> Variant:
        return self.variants[0 if group["trust_ratio"] else 1]

    def factors(self, measured: Measured) -> dict[str, Any]:
        p, update = measured.sums
        return {"lr": measured.h.lr * trust_ratio(p.sqrt(), update.sqrt())}
