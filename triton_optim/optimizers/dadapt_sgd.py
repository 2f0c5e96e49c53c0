"""SGD with D-Adaptation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..core.whole_model import EstimatesDistance, check_estimate, grown, over_model
from ..kernels.rules.dadapt import DAdaptSGDScalars, dadapt_sgd, dadapt_sgd_sums
from ..options import Options
from ..spec import Measured, State


class DAdaptSGD(EstimatesDistance, RuleOptimizer):
    r"""SGD with D-Adaptation, which finds the step size from how far the gradients agree with those before.

    With sums over the whole model and :math:`\eta_t = d_{t-1} \gamma / \lVert g_1 \rVert`:

    .. math::
        n_t &= n_{t-1} + \eta_t \langle g_t, s_{t-1} \rangle, \qquad s_t = s_{t-1} + \eta_t g_t, \qquad
            \hat d_t = \frac{2 n_t}{\lVert s_t \rVert} \\
        d_t &= \max(d_{t-1}, \min(\hat d_t, \rho d_{t-1})), \qquad
            p_t = \mu p_{t-1} + (1 - \mu) (p_0 - s_t)

    Leave ``lr`` at 1 and let a schedule multiply it. Parameters whose ``lr`` is 0 stand still; the estimate is of the
    others. The growth's bound is the first group's. The norm is of the first gradients that are not all 0, before the
    decay.

    State of a parameter: ``s`` and ``x0``, which is :math:`p_0`, like the parameter; and of the whole model, each 0-dim
    and float64 where the device has it: ``d``, ``numerator_weighted`` :math:`n` and ``g0_norm``. The property ``d`` is
    the estimate, on the device.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        momentum: :math:`\mu` in [0, 1).
        weight_decay: :math:`\lambda \ge 0`; :math:`\lambda p` is added to the gradient.
        d0: the first estimate, positive.
        growth_rate: :math:`\rho \ge 1`: how many times as large the estimate may become in a step.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = triton_optim.DAdaptSGD([p], d0=0.5, backend="eager")
        >>> p.square().sum().backward()
        >>> optimizer.step()  # half of a step whose length is 1
        >>> p.data
        tensor([2.7000, 3.6000])

    For: SGD's place, without a learning rate to tune.

    Source: Defazio and Mishchenko 2023, Algorithm 4, https://arxiv.org/abs/2301.07733; the averaging, the decay and the
    factor of the estimate are the authors' code's.
    """

    rule = dadapt_sgd
    measure = dadapt_sgd_sums
    states = (State("s", quantized=False), State("x0", start="parameter", quantized=False))
    kept_states = (State("d"), State("numerator_weighted"), State("g0_norm"))
    counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        growth_rate: float = float("inf"),
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "d0": d0, "growth_rate": growth_rate}
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "weight_decay")
        check_range("momentum value", group["momentum"], 0.0, 1.0)
        check_estimate(group)

    def scalars(self, group: dict[str, Any], step: Any) -> DAdaptSGDScalars:
        """As they are where d over the norm is 1."""
        moves, momentum = (group["lr"] > 0) * 1.0, group["momentum"]
        return DAdaptSGDScalars(
            share=group["lr"],
            l2=group["weight_decay"],
            momentum=moves * momentum + (1 - moves),
            one_minus_momentum=moves * (1 - momentum),
            counts=moves,
            growth_rate=group["growth_rate"],
        )

    def total(self, measured: list[Measured]) -> Tensor | None:
        """The estimate before the step over the norm of the first gradient."""
        if not measured:
            return None
        d, numerator, norm = self.kept_numbers(measured[0])
        terms = []
        for m in measured:
            rate, (squares, products, gradient, own) = m.h.share, (found.sum() for found in m.sums)
            counted = (squares, rate * products, rate**2 * gradient, own)
            terms.append((rate * products, *(m.h.counts * x for x in counted)))
        inner, squares, products, gradient, own = over_model(measured, terms).unbind()
        norm = torch.where(norm > 0, norm, own.sqrt())
        rate = torch.where(norm > 0, d / norm, 0.0)
        numerator = numerator + rate * inner
        size = squares + 2 * rate * products + rate * rate * gradient
        found = 2 * numerator / torch.where(size > 0, size, 1.0).sqrt()
        self.keep_numbers(grown(d, found, size > 0, measured[0].h.growth_rate), numerator, norm)
        return rate

    def factors(self, measured: Measured) -> dict[str, Any]:
        return {"share": measured.h.share * measured.total.to(measured.numel.device)}
