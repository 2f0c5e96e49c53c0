"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.rmsprop import (
    RMSpropScalars,
    rmsprop,
    rmsprop_centered,
    rmsprop_centered_momentum,
    rmsprop_momentum,
)
from ..options import OwnOptions
from ..spec import State, Variant

SQUARE = State("square_avg", nonnegative=True)


class RMSprop(RuleOptimizer):
    r"""RMSprop, with torch.optim.RMSprop's arguments, defaults and state.

    With :math:`g_t` the gradient plus :math:`\lambda p_{t-1}`:

    .. math::
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon} \\
        p_t &= p_{t-1} - \gamma b_t

    with :math:`v_t - a_t^2` for :math:`v_t` in the quotient if ``centered``, where
    :math:`a_t = \alpha a_{t-1} + (1 - \alpha) g_t`. A difference that rounds below 0 counts as 0; torch's gives NaN.

    State of a parameter: ``step`` (0-dim float32), ``square_avg`` :math:`v`, with a momentum ``momentum_buffer``
    :math:`b`, with ``centered`` ``grad_avg`` :math:`a`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        alpha: :math:`\alpha \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, added to the gradient as :math:`\lambda p_{t-1}`.
        momentum: :math:`\mu \ge 0`.
        centered: divide by the standard deviation of the gradients.
        foreach, maximize, differentiable, capturable, options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.RMSprop([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['square_avg', 'step']

    For: Reinforcement learning and recurrent networks whose published settings are for it; one state.

    Source: Tieleman & Hinton 2012, lecture 6.5; Graves 2013, https://arxiv.org/abs/1308.0850, where
    :math:`\epsilon` is in the root; here as torch's it is outside.
    """

    variants = (
        Variant(rmsprop, (SQUARE,)),
        Variant(rmsprop_momentum, (SQUARE, State("momentum_buffer"))),
        Variant(rmsprop_centered, (SQUARE, State("grad_avg"))),
        Variant(rmsprop_centered_momentum, (SQUARE, State("momentum_buffer"), State("grad_avg"))),
    )
    option_names = ("capturable", "foreach", "maximize", "differentiable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[OwnOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
        }
        super().__init__(
            params,
            defaults,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            **options,
        )

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "momentum", "weight_decay", "alpha")

    def check_parameter(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        super().check_parameter(index, p, group)
        kept = group.get("state_dtype")
        if group["centered"] and kept not in (None, torch.float32):
            raise RuntimeError(
                "RMSprop(centered=True) takes the root of square_avg - grad_avg**2, which may be negative once the two "
                f"are rounded by state_dtype={kept!r}. Use state_dtype=torch.float32, or centered=False."
            )

    def variant(self, group: dict[str, Any]) -> Variant:
        return self.variants[2 * bool(group["centered"]) + (group["momentum"] > 0)]

    def scalars(self, group: dict[str, Any], step: Any) -> RMSpropScalars:
        alpha = group["alpha"]
        return RMSpropScalars(group["lr"], group["weight_decay"], alpha, 1 - alpha, group["momentum"], group["eps"])
