"""AdamC."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adam import AdamScalars, adamw
from ..options import Options
from ..spec import State
from .adam import adam_scalars


class AdamC(RuleOptimizer):
    r"""AdamC: AdamW whose decay falls with the square of the learning rate, so that gradients don't grow at the end.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= \left(1 - \frac{\gamma_t^2}{\gamma_{max}} \lambda\right) p_{t-1}
            - \frac{\gamma_t}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    The correction is for weights that a normalization follows; give others, such as the last layer, to AdamW.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        max_lr: :math:`\gamma_{max} > 0`, the largest learning rate of the schedule. None for the `lr` that a group is
            made with, which schedulers multiply; its ``max_lr`` holds it then. ``OneCycleLR`` sets its own there.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.AdamC([p], lr=0.5, backend="eager")
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["max_lr"]
        (0.25, 0.5)

    For: Long runs with weight decay and a falling schedule, where the norm of the gradients rises at the end.

    Source: Defazio 2025, Algorithm 1, https://arxiv.org/abs/2506.02285.
    """

    rule = adamw
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_lr: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_lr": max_lr}
        super().__init__(params, defaults, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch.optim; its `lr` is the largest where it gives no `max_lr`."""
        super().add_param_group(param_group)
        note_max_lr(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of AdamW's checkpoints
            note_max_lr(group)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")
        if not (group["lr"] if group["max_lr"] is None else group["max_lr"]) > 0:
            raise ValueError(
                f"Invalid max_lr: {group['max_lr']}, with lr={group['lr']}. It must be positive, and None stands for "
                "lr. Give the largest learning rate of the schedule."
            )

    def scalars(self, group: dict[str, Any], step: Any) -> AdamScalars:
        decay = group["weight_decay"] * (group["lr"] / group["max_lr"])
        return adam_scalars({**group, "weight_decay": decay}, step, decoupled=True)


def note_max_lr(group: dict[str, Any]) -> None:
    """Give a group that has no largest learning rate the one that it starts from."""
    if group["max_lr"] is None:
        started = group.get("initial_lr", group["lr"])
        group["max_lr"] = float(started.detach() if isinstance(started, Tensor) else started)
