"""LARS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.lars import LarsScalars, lars, lars_momentum, lars_nesterov, lars_norms, lars_norms_momentum
from ..options import Options
from ..spec import Measured, State, Variant
from .sgd import check_nesterov

BUFFER = (State("momentum_buffer"),)


class LARS(RuleOptimizer):
    r"""LARS: SGD with momentum, of gradients whose length goes with that of their parameter: for large batches.

    With norms over a parameter:

    .. math::
        u_t &= \eta \frac{\lVert p_{t-1} \rVert}{\lVert g_t \rVert + \lambda \lVert p_{t-1} \rVert}
            (g_t + \lambda p_{t-1}) \\
        b_1 &= u_1, \qquad b_t = \mu b_{t-1} + (1 - \tau) u_t \\
        p_t &= p_{t-1} - \gamma b_t, \quad \text{with nesterov} \quad p_t = p_{t-1} - \gamma (u_t + \mu b_t)

    What :math:`g_t + \lambda p_{t-1}` is multiplied by is 1 where one of the norms is 0, and for groups with
    ``trust_ratio=False``: biases and the scales of norms are best put in one of these, with no decay.

    State of a parameter: ``momentum_buffer`` :math:`b`, like the parameter; none without momentum.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        momentum: :math:`\mu \ge 0`.
        dampening: :math:`\tau`.
        weight_decay: :math:`\lambda \ge 0`.
        nesterov: Nesterov's momentum; needs a momentum and no dampening.
        trust_coefficient: :math:`\eta \ge 0`.
        trust_ratio: whether the length of a gradient goes with its parameter's.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = triton_optim.LARS([p], lr=0.1, trust_coefficient=1.0, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()  # by a tenth of the norm, 5
        >>> print(f"{(p.detach() - torch.tensor([3.0, 4.0])).norm():.4f}")
        0.5000

    For: Batches of many thousands for convolutional networks, in SGD's place, and self-supervised recipes.

    Source: You et al. 2017, Algorithm 1, https://arxiv.org/abs/1708.03888. The learning rate multiplies the buffer, as
    in torch's SGD, and not what is added to it: the two differ while it changes.
    """

    counts_steps = False
    variants = (
        Variant(lars, ()),
        Variant(lars_momentum, BUFFER),
        Variant(lars_nesterov, BUFFER),
        Variant(lars, (), measure=lars_norms),
        Variant(lars_momentum, BUFFER, measure=lars_norms_momentum),
        Variant(lars_nesterov, BUFFER, measure=lars_norms_momentum),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        trust_ratio: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "trust_ratio": trust_ratio,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "momentum", "weight_decay", "trust_coefficient")
        check_nesterov(group)

    def variant(self, group: dict[str, Any]) -> Variant:
        form = 0 if group["momentum"] == 0 else 2 if group["nesterov"] else 1
        return self.variants[form + 3 * bool(group["trust_ratio"])]

    def scalars(self, group: dict[str, Any], step: Any) -> LarsScalars:
        later = step != 1
        return LarsScalars(
            trust=1.0,
            lr=group["lr"],
            l2=group["weight_decay"],
            momentum=later * group["momentum"],
            one_minus_dampening=1 - later * group["dampening"],
            nesterov=group["momentum"],
            coefficient=group["trust_coefficient"],
        )

    def factors(self, measured: Measured) -> dict[str, Any]:
        p, g = (squares.sqrt() for squares in measured.sums)
        h = measured.h
        return {"trust": torch.where((p > 0) & (g > 0), h.coefficient * p / (g + h.l2 * p), 1.0)}
