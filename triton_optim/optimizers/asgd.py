"""Averaged stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.asgd import ASGDScalars, asgd
from ..options import OwnOptions
from ..spec import State


class ASGD(RuleOptimizer):
    r"""Averaged stochastic gradient descent, with torch.optim.ASGD's arguments, defaults and state.

    With :math:`g_t` the gradient plus :math:`w p_{t-1}`, :math:`\eta_1 = \gamma` and :math:`\mu_1 = 1`:

    .. math::
        p_t &= (1 - \lambda \eta_t) p_{t-1} - \eta_t g_t, \qquad a_t = a_{t-1} + \mu_t (p_t - a_{t-1}) \\
        \eta_{t+1} &= \gamma / (1 + \lambda \gamma t)^\alpha, \qquad \mu_{t+1} = 1 / \max(1, t - t_0)

    State of a parameter: ``step``, ``eta`` :math:`\eta` and ``mu`` :math:`\mu` (0-dim float32, on its device), ``ax``
    :math:`a`, the average, which is never quantized. A changed learning rate acts one step later, through :math:`\eta`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        lambd: :math:`\lambda \ge 0`, the decay.
        alpha: :math:`\alpha \ge 0`, the power of the decay of :math:`\eta`.
        t0: :math:`t_0`, the step at which averaging begins.
        weight_decay: :math:`w \ge 0`, added to the gradient as :math:`w p_{t-1}`.
        foreach, maximize, differentiable, capturable, options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.ASGD([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['ax', 'eta', 'mu', 'step']

    For: Convex or nearly convex losses, where the mean of the weights is better than the last; the state ``ax`` is that
    mean.

    Source: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046, in torch's form.
    """

    rule = asgd
    states = (State("ax", quantized=False),)
    counts_on_device = True
    option_names = ("foreach", "maximize", "differentiable", "capturable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[OwnOptions],
    ) -> None:
        defaults = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
            **options,
        )

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "lambd", "alpha", "weight_decay")

    def init_scalar_state(self, group: dict[str, Any]) -> dict[str, float]:
        lr = group["lr"]
        return {"eta": float(lr.detach() if isinstance(lr, Tensor) else lr), "mu": 1.0}

    def update_scalar_state(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, eta: Any, mu: Any
    ) -> dict[str, Any]:
        lr, late = group["lr"], step - group["t0"]
        return {
            "eta": lr / (1 + group["lambd"] * lr * step) ** group["alpha"],
            "mu": 1 / (late.clamp(min=1) if isinstance(late, Tensor) else max(1, late)),
        }

    def scalars(self, group: dict[str, Any], step: Any, *, eta: Any, mu: Any) -> ASGDScalars:  # type: ignore[override]
        return ASGDScalars(group["weight_decay"], 1 - group["lambd"] * eta, eta, mu, 1 - mu)
