"""Signum and Tiger."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.signum import SignumScalars, signsgd, signum
from ..options import Options
from ..spec import State, Variant


class Signum(RuleOptimizer):
    r"""Signum: the sign of the momentum, with decoupled weight decay; without momentum, signSGD.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad
        p_t = (1 - \gamma\lambda) p_{t-1} - \gamma \operatorname{sign}(m_t)

    State of a parameter: ``exp_avg`` :math:`m`; none without momentum. As torch.sign, the sign of NaN is 0.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. A tenth to a third of AdamW's is usual.
        momentum: :math:`\beta` in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Signum([p], lr=0.25, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Large batches in one state, or to see what the sign alone does; Lion takes two betas for the same.

    Source: Bernstein et al. 2018, Algorithms 1 and 2, https://arxiv.org/abs/1802.04434.
    """

    states = (State("exp_avg"),)
    variants = (Variant(signum, (State("exp_avg"),)), Variant(signsgd, ()))
    counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "weight_decay")
        check_range("momentum value", group["momentum"], 0.0, 1.0)

    def variant(self, group: dict[str, Any]) -> Variant:
        momentum = group["momentum"]
        return self.variants[not isinstance(momentum, Tensor) and momentum == 0]

    def scalars(self, group: dict[str, Any], step: Any) -> SignumScalars:
        return signum_scalars(group["lr"], group["momentum"], group["weight_decay"])


class Tiger(RuleOptimizer):
    r"""Tiger: the sign of the momentum, with decoupled weight decay; :class:`Signum` with other defaults.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad
        p_t = p_{t-1} - \gamma (\operatorname{sign}(m_t) + \lambda p_{t-1})

    State of a parameter: ``exp_avg`` :math:`m`. As torch.sign, the sign of NaN is 0.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        beta: :math:`\beta` in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Tiger([p], lr=0.25, weight_decay=0.0, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Signum's place, with the settings of its author's language models.

    Source: Su 2023, https://github.com/bojone/tiger, but for what that code multiplies the learning rate by: the root
    mean square of a weight, of embeddings of each row; and 0.5 for biases and the scales of norms, which do not decay
    there and which a group can hold.
    """

    rule = signum
    states = (State("exp_avg"),)
    counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "weight_decay")
        check_range("beta value", group["beta"], 0.0, 1.0)

    def scalars(self, group: dict[str, Any], step: Any) -> SignumScalars:
        return signum_scalars(group["lr"], group["beta"], group["weight_decay"])


def signum_scalars(lr: Any, beta: Any, weight_decay: Any) -> SignumScalars:
    """What the rules take."""
    return SignumScalars(lr=lr, keep=1 - lr * weight_decay, beta=beta, one_minus_beta=1 - beta)
