"""Adam with D-Adaptation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_positive, check_ranges
from ..core.optimizer import RuleOptimizer
from ..core.whole_model import DAdapts, check_estimate
from ..kernels.rules.dadapt import DAdaptAdamScalars, dadapt_adam, dadapt_adam_sums
from ..options import Options
from ..spec import Measured, State


class DAdaptAdam(DAdapts, RuleOptimizer):
    r"""Adam with D-Adaptation, which finds the step size from how far the gradients agree with those before.

    With sums over the whole model, :math:`\eta_t = d_{t-1} \gamma` and :math:`\beta_3 = \sqrt{\beta_2}`:

    .. math::
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) \, \eta_t \Bigl\langle g_t,
            \frac{s_{t-1}}{\sqrt{v_{t-1}} + \epsilon} \Bigr\rangle, \qquad
            s_t = \beta_3 s_{t-1} + (1 - \beta_3) \eta_t g_t \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \eta_t g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat d_t &= \frac{n_t}{(1 - \beta_3) \lVert s_t \rVert_1}, \qquad
            d_t = \max(d_{t-1}, \min(\hat d_t, \rho d_{t-1})) \\
        p_t &= p_{t-1} - \frac{m_t}{\sqrt{v_t} + \epsilon}

    Leave ``lr`` at 1 and let a schedule multiply it. Parameters whose ``lr`` is 0 stand still, and so do their states;
    the estimate is of the others. Options that tell how to estimate are the first group's. While all gradients are 0,
    nothing is estimated.

    State of a parameter: ``step`` (0-dim float32); ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v` and ``s``, like the
    parameter; and of the whole model, each 0-dim and float64 where the device has it: ``d`` and ``numerator_weighted``
    :math:`n`. The property ``d`` is the estimate, on the device.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon > 0`.
        weight_decay: :math:`\lambda \ge 0`.
        decouple: whether :math:`p_{t-1}` is multiplied by :math:`1 - \eta_t \lambda` first; else :math:`\lambda p` is
            added to the gradient.
        use_bias_correction: whether :math:`\eta` has Adam's bias corrections,
            :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`.
        d0: the first estimate, positive.
        growth_rate: :math:`\rho \ge 1`: how many times as large the estimate may become in a step.
        layer_scale: what a group's steps, and its parts of the sums, are multiplied by; positive.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = triton_optim.DAdaptAdam([p], backend="eager")
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     p.square().sum().backward()
        ...     optimizer.step()
        >>> bool(p < 3.0), bool(optimizer.d > 1e-6)
        (True, True)

    For: Recipes that name it, without a learning rate to tune. Prodigy came after it and finds the step size sooner.

    Source: Defazio and Mishchenko 2023, Algorithm 5, https://arxiv.org/abs/2301.07733; the decoupled decay, the bias
    corrections, the bound of the growth and the scale of a group are the authors' code's. There the corrections count
    the steps of all, here each parameter its own; and a group whose ``lr`` becomes 0 goes on by its mean, and decays.
    """

    rule = dadapt_adam
    measure = dadapt_adam_sums
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True), State("s"))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = float("inf"),
        layer_scale: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "use_bias_correction": use_bias_correction,
            "d0": d0,
            "growth_rate": growth_rate,
            "layer_scale": layer_scale,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "betas", "weight_decay")
        check_positive("epsilon", group["eps"])  # s and v begin as 0
        check_estimate(group)
        check_positive("layer_scale", group["layer_scale"])

    def scalars(self, group: dict[str, Any], step: Any) -> DAdaptAdamScalars:
        """As they are where d is 1."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        beta3, scale, moves = beta2**0.5, group["layer_scale"], (lr > 0) * 1.0
        rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) if group["use_bias_correction"] else lr
        decay, decouple = group["weight_decay"], group["decouple"]
        return DAdaptAdamScalars(
            fade=-rate * decay if decouple else 0.0,
            l2=0.0 if decouple else decay,
            beta1=moves * beta1 + (1 - moves),
            one_minus_beta1=scale * rate * (1 - beta1),
            beta2=moves * beta2 + (1 - moves),
            one_minus_beta2=moves * (1 - beta2),
            beta3=moves * beta3 + (1 - moves),
            share=rate * (1 - beta3),
            eps=group["eps"],
            moves=moves,
            weight=scale * rate,
            counts=scale * moves,
            decay=beta3,
            growth_rate=group["growth_rate"],
        )

    def kept_scalars(self, measured: Measured) -> dict[str, Any]:
        d, _ = self.kept_numbers(measured)
        return {name: getattr(measured.h, name) * d for name in ("fade", "one_minus_beta1", "share", "weight")}
