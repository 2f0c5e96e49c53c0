"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.sgd import SGDScalars, sgd, sgd_momentum, sgd_nesterov
from ..options import Options
from ..spec import State, Variant


class SGD(RuleOptimizer):
    r"""Stochastic gradient descent, with torch.optim.SGD's arguments, defaults and state.

    With :math:`g_t` the gradient plus :math:`\lambda p_{t-1}`:

    .. math::
        b_1 &= g_1, \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t \\
        p_t &= p_{t-1} - \gamma b_t, \quad \text{with nesterov} \quad p_t = p_{t-1} - \gamma (g_t + \mu b_t)

    State of a parameter: ``momentum_buffer`` :math:`b`, like the parameter; none without momentum.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        momentum: :math:`\mu \ge 0`.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda \ge 0`; a number or a 1-element tensor.
        nesterov: Nesterov's momentum; needs a momentum and no dampening.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.SGD([p], lr=0.5, momentum=0.9, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.5000, 0.5000])

    For: Convolutional networks with a tuned schedule, or little memory: with momentum it keeps one state, without it
    none.

    Source: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html, in the form of torch.optim.SGD's
    documentation, which differs in where the learning rate stands.
    """

    counts_steps = False
    option_names = ("maximize", "foreach", "differentiable", "fused")  # torch's groups have no capturable
    variants = (
        Variant(sgd, ()),
        Variant(sgd_momentum, (State("momentum_buffer"),)),
        Variant(sgd_nesterov, (State("momentum_buffer"),)),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "momentum", "weight_decay")
        check_nesterov(group)

    def variant(self, group: dict[str, Any]) -> Variant:
        if group["momentum"] == 0:
            return self.variants[0]
        return self.variants[2 if group["nesterov"] else 1]

    def sparse_gradients(self, group: dict[str, Any]) -> str:
        return "rows" if group["momentum"] == 0 and group["weight_decay"] == 0 else "dense"

    def scalars(self, group: dict[str, Any], step: Any) -> SGDScalars:
        later = step != 1
        return SGDScalars(
            lr=group["lr"],
            l2=group["weight_decay"],
            momentum=later * group["momentum"],
            one_minus_dampening=1 - later * group["dampening"],
            nesterov=group["momentum"],
        )


def check_nesterov(group: dict[str, Any]) -> None:
    """Raise ValueError where Nesterov's momentum is asked for without a momentum, or with dampening."""
    momentum, dampening = group["momentum"], group["dampening"]
    if group["nesterov"] and not (momentum > 0 and dampening == 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening; "
            f"got momentum={momentum}, dampening={dampening}. Set momentum=0.9, dampening=0, or nesterov=False."
        )
