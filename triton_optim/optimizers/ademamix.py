"""AdEMAMix and Simplified AdEMAMix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_betas, check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.ademamix import AdEMAMixScalars, SimplifiedAdEMAMixScalars, ademamix, simplified_ademamix
from ..options import Options
from ..spec import State


class AdEMAMix(RuleOptimizer):
    r"""AdEMAMix: AdamW with a second, much slower mean of the gradient, which is not bias-corrected.

    .. math::
        f_t &= \beta_1 f_{t-1} + (1 - \beta_1) g_t, \qquad s_t = \beta_3 s_{t-1} + (1 - \beta_3) g_t, \qquad
            v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \gamma\lambda) p_{t-1}
            - \gamma \frac{f_t / (1 - \beta_1^t) + \alpha s_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    With warm-ups of :math:`T` steps, :math:`\alpha` rises from 0 as :math:`\alpha\, t / T`, and :math:`\beta_3` from
    :math:`\beta_1` so that :math:`1 / \ln \beta` is linear in :math:`t`: the half-life of the mean grows linearly.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg_fast`` :math:`f`, ``exp_avg_slow`` :math:`s`,
    ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1).
        alpha: :math:`\alpha \ge 0`, the weight of the slow mean. The paper uses 4 to 10, its code 2 unless told.
        beta3_warmup: the steps in which :math:`\beta_3` rises; None for none. The paper uses all of the training.
        alpha_warmup: the steps in which :math:`\alpha` rises; None for none. The paper uses all of the training.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.AdEMAMix([p], lr=0.25, alpha=0.0, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Long runs with memory for a third state. Of eleven optimizers tuned for language models
    (https://arxiv.org/abs/2509.01440) it and MARS led.

    Source: Pagliardini et al. 2024, Algorithm 1, https://arxiv.org/abs/2409.03137. The authors' code takes the
    logarithm of :math:`\beta + 10^{-8}` in the warm-up of :math:`\beta_3`, the paper and this of :math:`\beta`.
    """

    rule = ademamix
    states = (State("exp_avg_fast"), State("exp_avg_slow"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "beta3_warmup": beta3_warmup,
            "alpha_warmup": alpha_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "alpha", "weight_decay")
        check_betas(group["betas"], 3)
        check_warmup("beta3_warmup", group["beta3_warmup"])
        check_warmup("alpha_warmup", group["alpha_warmup"])

    def scalars(self, group: dict[str, Any], step: Any) -> AdEMAMixScalars:
        lr, alpha, (beta1, beta2, beta3) = group["lr"], group["alpha"], group["betas"]
        beta3 = warm_beta(beta1, beta3, step, group["beta3_warmup"])
        return AdEMAMixScalars(
            keep=1 - lr * group["weight_decay"],
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            beta3=beta3,
            one_minus_beta3=1 - beta3,
            fast_step=lr / (1 - beta1**step),
            slow_step=lr * alpha * share(step, group["alpha_warmup"]),
            correction=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )


class SimplifiedAdEMAMix(RuleOptimizer):
    r"""Simplified AdEMAMix: the gradient and one long running sum of it, over the root of the second moment.

    .. math::
        m_t &= \beta_1 m_{t-1} + g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \gamma\lambda) p_{t-1}
            - \gamma \frac{\alpha g_t + m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    :math:`m` is a sum, about :math:`1 / (1 - \beta_1)` times a mean: so much smaller is :math:`\gamma` than AdamW's.
    ``bias_correction1`` divides by the sum of the weights in :math:`m_t`; without ``bias_correction2`` the quotient is
    divided by :math:`\sqrt{1 - \beta_2^t}`. With a warm-up, :math:`\beta_1` rises from ``min_beta1`` as
    :class:`AdEMAMix`'s :math:`\beta_3`.

    State of a parameter: ``step`` and ``num_sum``, the sum of the weights in :math:`m` (0-dim float32), ``exp_avg``
    :math:`m`, ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        alpha: :math:`\alpha \ge 0`, the weight of the gradient.
        beta1_warmup: the steps in which :math:`\beta_1` rises; None for none.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        min_beta1: where :math:`\beta_1` rises from, in [0, 1).
        bias_correction1: correct the numerator.
        bias_correction2: correct the denominator.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.SimplifiedAdEMAMix([p], lr=0.25, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Small batches, where one long momentum does what AdEMAMix's two do, in AdamW's memory.

    Source: Morwani et al. 2025, Algorithm 1, https://arxiv.org/abs/2502.02431; the defaults, the warm-up and the choice
    of bias corrections are of the authors' code, whose warm-up takes the logarithm of :math:`\beta + 10^{-8}`.
    """

    rule = simplified_ademamix
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.99, 0.95),
        alpha: float = 0.0,
        beta1_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_beta1: float = 0.9,
        bias_correction1: bool = False,
        bias_correction2: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "beta1_warmup": beta1_warmup,
            "eps": eps,
            "weight_decay": weight_decay,
            "min_beta1": min_beta1,
            "bias_correction1": bias_correction1,
            "bias_correction2": bias_correction2,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "alpha", "weight_decay")
        check_warmup("beta1_warmup", group["beta1_warmup"])
        check_range("min_beta1 value", group["min_beta1"], 0.0, 1.0)

    def init_scalar_state(self, group: dict[str, Any]) -> dict[str, float]:
        return {"num_sum": 0.0}

    def update_scalar_state(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, num_sum: Any
    ) -> dict[str, Any]:
        beta1 = warm_beta(group["min_beta1"], group["betas"][0], step, group["beta1_warmup"])
        return {"num_sum": beta1 * num_sum + 1}

    def scalars(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, num_sum: Any
    ) -> SimplifiedAdEMAMixScalars:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        beta1 = warm_beta(group["min_beta1"], beta1, step, group["beta1_warmup"])
        correction = (1 - beta2**step) ** -0.5
        size = lr / (beta1 * num_sum + 1) if group["bias_correction1"] else lr
        return SimplifiedAdEMAMixScalars(
            keep=1 - lr * group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            alpha=group["alpha"],
            step_size=size if group["bias_correction2"] else size * correction,
            correction=correction,
            eps=group["eps"],
        )


def check_warmup(name: str, steps: Any) -> None:
    """Raise ValueError unless it is None or a number of steps."""
    if steps is not None and not steps >= 0:
        raise ValueError(f"Invalid {name} value: {steps}. It must be a number of steps, at least 0, or None for none.")


def share(step: Any, warmup: Any) -> Any:
    """How much of a warm-up of so many steps is done in an update, up to 1."""
    if warmup is None:
        return 1.0
    if isinstance(step, Tensor) or isinstance(warmup, Tensor):
        return torch.where(step < warmup, step / warmup, 1.0)
    return step / warmup if step < warmup else 1.0


def log(x: Any) -> Any:
    """The natural logarithm, also of a number; of 0 it is -Inf."""
    return torch.log(x) if isinstance(x, Tensor) else math.log(x) if x > 0 else -math.inf


def warm_beta(start: Any, end: Any, step: Any, warmup: Any) -> Any:
    """A beta that rises from `start` to `end` so that the half-life of its mean grows linearly."""
    done = share(step, warmup)
    if not isinstance(done, Tensor) and done == 1:
        return end
    rate = (1 - done) / log(start) + done / log(end)  # 1 / ln(beta)
    if isinstance(rate, Tensor):
        return torch.where(done < 1, torch.exp(1 / rate), end)
    return math.exp(1 / rate) if rate else 0.0
