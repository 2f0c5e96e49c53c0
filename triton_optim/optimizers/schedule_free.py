"""Schedule-Free optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_range, check_ranges
from ..core.two_places import TwoPlaces
from ..kernels.rules.schedule_free import (
    ScheduleFreeAdamWScalars,
    ScheduleFreeRAdamScalars,
    ScheduleFreeSGDScalars,
    schedule_free_adamw,
    schedule_free_radam,
    schedule_free_sgd,
)
from ..options import Options
from ..spec import State
from .ademamix import check_warmup
from .ademamix import share as done
from .radam import rectification


class _ScheduleFree(TwoPlaces):
    """What the optimizers here have in common: z, its mean, and what it is weighted by."""

    exact_scalar_states = ("weight_sum",)

    def share(self, group: dict[str, Any]) -> Any:
        return group["betas"][0]

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "weight_decay", "r", "weight_lr_power")

    def init_scalar_state(self, group: dict[str, Any]) -> dict[str, float]:
        return {"weight_sum": 0.0, "lr_max": 0.0}

    def update_scalar_state(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, weight_sum: Any, lr_max: Any
    ) -> dict[str, Any]:
        weight_sum, lr_max, _ = weighted(group, step, warm_lr(group, step), weight_sum, lr_max)
        return {"weight_sum": weight_sum, "lr_max": lr_max}


class ScheduleFreeAdamW(_ScheduleFree):
    r"""Schedule-Free AdamW: AdamW whose mean takes the place of a schedule of the learning rate.

    The parameter is :math:`y`, where gradients are taken, while it trains. :meth:`eval` makes it :math:`x`, the mean,
    which is what to evaluate and to use, and :meth:`train` makes it :math:`y` again. With
    :math:`\gamma_t = \gamma \min(1, t / T)` in a warm-up of :math:`T` steps, :math:`\gamma^*_t` the largest so far:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
            u_t = \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda y_{t-1} \\
        w_t &= t^r (\gamma^*_t)^q, \qquad c_t = w_t / \sum_{i=1}^t w_i, \qquad z_t = z_{t-1} - \gamma_t u_t \\
        x_t &= (1 - c_t) x_{t-1} + c_t z_t, \qquad y_t = \beta_1 x_t + (1 - \beta_1) z_t

    State of a parameter: ``step``, ``lr_max`` :math:`\gamma^*` (0-dim float32), ``weight_sum`` :math:`\sum w` (0-dim
    float64), ``z`` :math:`z`, which is never quantized, ``exp_avg_sq`` :math:`v`. Beside 16-bit parameters whose
    rounding is kept, :math:`z` is float32 with ``state_dtype=torch.float32``.

    Batch norm's statistics are those of :math:`y` unless some batches run through the model after :meth:`eval`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. 1 to 10 times that of a schedule is best.
        betas: :math:`(\beta_1, \beta_2)`; the first is in (0, 1), the second in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        warmup_steps: :math:`T \ge 0`.
        r: :math:`r \ge 0`: later steps weigh more.
        weight_lr_power: :math:`q \ge 0`: steps of a warm-up weigh less.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: of a step after :meth:`eval`.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.ScheduleFreeAdamW([p], lr=0.25, backend="eager")
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     p.sum().backward()
        ...     optimizer.step()
        >>> p.data
        tensor([0.6125, 0.6125])
        >>> optimizer.eval()
        >>> p.data
        tensor([0.6250, 0.6250])
        >>> optimizer.train()

    For: Training whose end is not known, or that wants no schedule; it won AlgoPerf's self-tuning ruleset in 2024.
    Rates of 1 to 10 times AdamW's fit.

    Source: Defazio et al. 2024, Algorithm 1, https://arxiv.org/abs/2405.15682; the decay at :math:`y` and the weights
    are of the authors' code, where :math:`t` counts a group's steps, here a parameter's own.
    """

    rule = schedule_free_adamw
    states = (State("z", start="parameter", quantized=False), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        super().check_hyperparameters(group)
        check_ranges(group, "eps", "betas")
        check_momentum("beta parameter at index 0", group["betas"][0])
        check_warmup("warmup_steps", group["warmup_steps"])

    def scalars(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, weight_sum: Any, lr_max: Any
    ) -> ScheduleFreeAdamWScalars:
        beta1, beta2 = group["betas"]
        return ScheduleFreeAdamWScalars(
            **moves(group, step, warm_lr(group, step), beta1, weight_sum, lr_max),
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            correction=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )


class ScheduleFreeRAdam(_ScheduleFree):
    r"""Schedule-Free RAdam: :class:`ScheduleFreeAdamW` with RAdam's rectification in the place of a warm-up.

    With :math:`\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)`, :math:`\rho_\infty = 2 / (1 - \beta_2) - 1`,
    the learning rate :math:`\gamma_t` is :math:`\gamma` times

    .. math::
        \sqrt{\frac{(\rho_t - 4) (\rho_t - 2) \rho_\infty}{(\rho_\infty - 4) (\rho_\infty - 2) \rho_t}}

    if :math:`\rho_t > 4`. Before, it is 0, and only :math:`v` changes; without ``silent_sgd_phase`` it is
    :math:`\gamma`, with :math:`u_t = g_t + \lambda y_{t-1}`.

    State of a parameter: as :class:`ScheduleFreeAdamW`'s.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`; the first is in (0, 1), the second in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        r: :math:`r \ge 0`: later steps weigh more.
        weight_lr_power: :math:`q \ge 0`: steps of a smaller learning rate weigh less.
        silent_sgd_phase: make no steps of SGD first.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: of a step after :meth:`eval`.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.ScheduleFreeRAdam([p], lr=0.25, silent_sgd_phase=False, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: Where ScheduleFreeAdamW would need a warm-up to be tuned.

    Source: Defazio et al. 2024, Algorithm 1, https://arxiv.org/abs/2405.15682, with Liu et al. 2020, Algorithm 2,
    https://arxiv.org/abs/1908.03265, as the authors' code has them.
    """

    rule = schedule_free_radam
    states = (State("z", start="parameter", quantized=False), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "silent_sgd_phase": silent_sgd_phase,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        super().check_hyperparameters(group)
        check_ranges(group, "eps", "betas")
        check_momentum("beta parameter at index 0", group["betas"][0])

    def update_scalar_state(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, weight_sum: Any, lr_max: Any
    ) -> dict[str, Any]:
        lr, _ = rectified_lr(group, step)
        weight_sum, lr_max, _ = weighted(group, step, lr, weight_sum, lr_max)
        return {"weight_sum": weight_sum, "lr_max": lr_max}

    def scalars(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, weight_sum: Any, lr_max: Any
    ) -> ScheduleFreeRAdamScalars:
        (lr, plain), (beta1, beta2) = rectified_lr(group, step), group["betas"]
        return ScheduleFreeRAdamScalars(
            **moves(group, step, lr, beta1, weight_sum, lr_max),
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            correction=(1 - beta2**step) ** -0.5,
            eps=1.0 * plain + group["eps"],  # of the quotient that is not used then, lest it be 0 / 0
            plain=plain,
        )


class ScheduleFreeSGD(_ScheduleFree):
    r"""Schedule-Free SGD: SGD whose mean takes the place of a schedule of the learning rate, and of momentum.

    As :class:`ScheduleFreeAdamW`, with :math:`u_t = g_t + \lambda y_{t-1}`, and the momentum for :math:`\beta_1`.

    State of a parameter: ``step``, ``lr_max`` (0-dim float32), ``weight_sum`` (0-dim float64), ``z``, which is never
    quantized.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. 10 to 50 times that of a schedule is best.
        momentum: :math:`\beta_1`, in (0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        warmup_steps: :math:`T \ge 0`.
        r: :math:`r \ge 0`: later steps weigh more.
        weight_lr_power: :math:`q \ge 0`: steps of a warm-up weigh less.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: of a step after :meth:`eval`.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.ScheduleFreeSGD([p], lr=0.25, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.7500, 0.7500])

    For: What SGD trains, without a schedule; rates of 10 to 50 times SGD's fit.

    Source: Defazio et al. 2024, Algorithm 1, https://arxiv.org/abs/2405.15682; the weights are of the authors' code.
    """

    rule = schedule_free_sgd
    states = (State("z", start="parameter", quantized=False),)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
        }
        super().__init__(params, defaults, **options)

    def share(self, group: dict[str, Any]) -> Any:
        return group["momentum"]

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        super().check_hyperparameters(group)
        check_momentum("momentum value", group["momentum"])
        check_warmup("warmup_steps", group["warmup_steps"])

    def scalars(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, weight_sum: Any, lr_max: Any
    ) -> ScheduleFreeSGDScalars:
        return ScheduleFreeSGDScalars(**moves(group, step, warm_lr(group, step), group["momentum"], weight_sum, lr_max))


def check_momentum(name: str, value: Any) -> None:
    """Raise ValueError unless 0 < value < 1."""
    check_range(name, value, 0.0, 1.0)
    if not value > 0:
        raise ValueError(f"Invalid {name}: {value}. It must be above 0 and below 1, as x is computed from y and z.")


def warm_lr(group: dict[str, Any], step: Any) -> Any:
    """The learning rate of an update."""
    return group["lr"] * done(step, group["warmup_steps"])


def rectified_lr(group: dict[str, Any], step: Any) -> tuple[Any, Any]:
    """The learning rate of an update of RAdam, and 1 while the variance can't be told, else 0."""
    factor = rectification(group["betas"][1], step, 4.0)
    plain = (factor == 0) * 1.0
    return group["lr"] * (factor if group["silent_sgd_phase"] else factor + plain), plain


def weighted(group: dict[str, Any], step: Any, lr: Any, weight_sum: Any, lr_max: Any) -> tuple[Any, Any, Any]:
    """The sum of the weights and the largest learning rate after an update, and the share of its z in the mean."""
    if isinstance(lr, Tensor) or isinstance(lr_max, Tensor):
        lr_max = torch.where(lr > lr_max, lr, lr_max)
    else:
        lr_max = max(lr, lr_max)
    weight = step ** group["r"] * lr_max ** group["weight_lr_power"]
    weight_sum = weight_sum + weight
    return weight_sum, lr_max, weight / (weight_sum + (weight_sum == 0) * 1.0)  # where all were 0, 0


def moves(group: dict[str, Any], step: Any, lr: Any, beta1: Any, weight_sum: Any, lr_max: Any) -> dict[str, Any]:
    """The scalars by which an update moves y and z."""
    _, _, share = weighted(group, step, lr, weight_sum, lr_max)
    y_step = lr * (1 - beta1 * (1 - share))
    return {"lr": lr, "share": share, "y_step": y_step, "weight_decay": group["weight_decay"]}
