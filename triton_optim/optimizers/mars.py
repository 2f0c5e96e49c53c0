"""MARS, with AdamW's update and with Lion's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_betas, check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.mars import (
    MarsAdamWScalars,
    MarsLionScalars,
    mars_adamw,
    mars_adamw_norm,
    mars_lion,
    mars_lion_norm,
)
from ..options import Options
from ..spec import Measured, State


class MARSAdamW(RuleOptimizer):
    r"""MARS-AdamW: AdamW of gradients from which some of their noise is taken, by the difference of two.

    With :math:`g_0 = 0` and a norm over the parameter:

    .. math::
        c_t &= g_t + \eta \frac{\beta_1}{1 - \beta_1} (g_t - g_{t-1}), \qquad
        \tilde c_t = c_t / \max(1, \lVert c_t \rVert) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \tilde c_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde c_t^2 \\
        p_t &= (1 - \gamma\lambda) p_{t-1}
            - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Parameters of less than two dimensions take :math:`\tilde c_t = g_t` and the betas of ``betas_1d``, which is
    AdamW, unless ``optimize_1d``. With a learning rate and decay of their own, they are a group.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`, ``previous_grad``
    :math:`g`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        gamma: :math:`\eta \ge 0`, how much of the difference is added.
        optimize_1d: whether parameters of less than two dimensions are treated as all others.
        betas_1d: theirs if they are not, each in [0, 1).
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = triton_optim.MARSAdamW([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([[0.9000, 0.9000],
                [0.9000, 0.9000]])

    For: Language models, with memory for a third state. Of eleven optimizers tuned for them
    (https://arxiv.org/abs/2509.01440) it and AdEMAMix led.

    Source: Yuan et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.10438, as its experiments approximate it: with the
    gradient of the last step and its batch in place of the last weights' of this batch. The authors' code treats as
    vectors all that is no matrix, convolutions too.
    """

    rule = mars_adamw
    measure = mars_adamw_norm
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True), State("previous_grad"))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        optimize_1d: bool = False,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "optimize_1d": optimize_1d,
            "betas_1d": betas_1d,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay", "gamma")
        check_betas(group["betas_1d"])

    def scalars(self, group: dict[str, Any], step: Any) -> MarsAdamWScalars:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        vector1, vector2 = group["betas"] if group["optimize_1d"] else group["betas_1d"]
        return MarsAdamWScalars(
            clip=1.0,
            gain=group["gamma"] * beta1 / (1 - beta1),
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            step_size=lr / (1 - beta1**step),
            correction=(1 - beta2**step) ** -0.5,
            keep=1 - lr * group["weight_decay"],
            eps=group["eps"],
            vector_beta1=vector1,
            vector_beta2=vector2,
            vector_step_size=lr / (1 - vector1**step),
            vector_correction=(1 - vector2**step) ** -0.5,
        )

    def factors(self, measured: Measured) -> dict[str, Any]:
        h, clip = measured.h, clip_of(measured)
        vectors = [p.dim() < 2 for p in measured.params]
        if measured.group["optimize_1d"] or not any(vectors):
            return {"clip": clip}
        own = {
            "clip": 1.0,
            "gain": 0.0,
            "beta1": h.vector_beta1,
            "one_minus_beta1": 1 - h.vector_beta1,
            "beta2": h.vector_beta2,
            "one_minus_beta2": 1 - h.vector_beta2,
            "step_size": h.vector_step_size,
            "correction": h.vector_correction,
        }
        # Made on the device: nothing is to wait for what would be brought there.
        yes, no = clip.new_ones((), dtype=torch.bool), clip.new_zeros((), dtype=torch.bool)
        chosen = torch.stack([yes if vector else no for vector in vectors])
        return {
            name: torch.where(chosen, exact(value, clip), exact(clip if name == "clip" else getattr(h, name), clip))
            for name, value in own.items()
        }


class MARSLion(RuleOptimizer):
    r"""MARS-Lion: the sign of a mean of gradients from which some of their noise is taken, by the difference of two.

    With :math:`g_0 = 0` and a norm over the parameter:

    .. math::
        c_t &= g_t + \eta \frac{\beta}{1 - \beta} (g_t - g_{t-1}), \qquad
        m_t = \beta m_{t-1} + (1 - \beta) \frac{c_t}{\max(1, \lVert c_t \rVert)} \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma \operatorname{sign}(m_t)

    State of a parameter: ``exp_avg`` :math:`m`, ``previous_grad`` :math:`g`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        beta: :math:`\beta`, in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        gamma: :math:`\eta \ge 0`, how much of the difference is added.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = triton_optim.MARSLion([p], lr=0.25, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([[0.7500, 0.7500],
                [0.7500, 0.7500]])

    For: Lion's place on noisy gradients, for one state more.

    Source: Yuan et al. 2024, Algorithm 4, https://arxiv.org/abs/2411.10438, as its experiments approximate it: with the
    gradient of the last step and its batch in place of the last weights' of this batch. The authors' code updates
    by AdamW all that is no matrix; give vectors to one.
    """

    rule = mars_lion
    measure = mars_lion_norm
    states = (State("exp_avg"), State("previous_grad"))
    counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        beta: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "gamma": gamma}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "weight_decay", "gamma")
        check_range("beta value", group["beta"], 0.0, 1.0)

    def scalars(self, group: dict[str, Any], step: Any) -> MarsLionScalars:
        lr, beta = group["lr"], group["beta"]
        return MarsLionScalars(
            clip=1.0,
            gain=group["gamma"] * beta / (1 - beta),
            beta1=beta,
            one_minus_beta1=1 - beta,
            lr=lr,
            keep=1 - lr * group["weight_decay"],
        )

    def factors(self, measured: Measured) -> dict[str, Any]:
        return {"clip": clip_of(measured)}


def clip_of(measured: Measured) -> Tensor:
    """What makes corrected gradients no longer than 1."""
    (squares,) = measured.sums
    return 1 / squares.sqrt().clamp(min=1)


def exact(value: Any, like: Tensor) -> Tensor:
    """A number as a tensor, made where it is needed."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)
