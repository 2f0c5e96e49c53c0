"""AdamH."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..buckets.gradient_norm import exact_dtype
from ..core.checks import check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adam import adamw
from ..kernels.rules.hyperball import AdamHScalars, adamh, adamh_sums
from ..options import Options
from ..spec import Measured, State, Variant
from ..util.in_place import write_each
from .adam import MOMENTS, adam_scalars


class AdamH(RuleOptimizer):
    r"""AdamH: Adam on a sphere. A step is as long, and the parameter after it, as the rate and its first norm say.

    With Adam's update :math:`u_t` and norms over a parameter, R the one that it has before its first step:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}, \qquad
        w_t = p_{t-1} - \gamma R \frac{u_t}{\lVert u_t \rVert}, \qquad p_t = R \frac{w_t}{\lVert w_t \rVert}

    It is for the matrices of a model, but not for embeddings. A parameter that starts as 0 stays 0. A parameter group
    with ``"hyperball": False`` is AdamW's, for biases, the scales of norms and embeddings, with the group's
    ``weight_decay``, 0 unless given.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`, and
    ``initial_norm`` :math:`R`, 0-dim float64.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. For spheres 0.0025 to 0.01 is usual.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = triton_optim.AdamH([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> print(f"{p.detach().norm():.4f}")
        5.0000

    For: Hyperball's rest of the network beside MuonH: matrices, the head among them, whose learning rate is to mean the
    same at any width and depth; nothing is decayed.

    Source: Wen et al. 2026, https://arxiv.org/abs/2606.16899; the norms are those of whole parameters.
    """

    variants = (Variant(adamh, MOMENTS, measure=adamh_sums), Variant(adamw, MOMENTS))
    group_names = ("hyperball",)
    kept_states = (
        State(
            "initial_norm",
            lambda p, group: (
                torch.zeros((), dtype=exact_dtype(p.device), device=p.device) if on_sphere(group) else None
            ),
        ),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas")
        decay = group.get("weight_decay", 0.0)
        check_range("weight_decay value", decay, 0.0)
        if on_sphere(group) and not decay == 0:
            raise ValueError(
                f"Invalid weight_decay value: {decay}. A parameter that keeps its norm does not decay: leave it out, "
                'or put the parameter in a group with "hyperball": False.'
            )

    def scalars(self, group: dict[str, Any], step: Any) -> Any:
        if not on_sphere(group):
            return adam_scalars({"weight_decay": 0.0, **group}, step, decoupled=True)
        beta1, beta2 = group["betas"]
        return AdamHScalars(
            step_size=group["lr"],
            back=1.0,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            correction=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )

    def variant(self, group: dict[str, Any]) -> Variant:
        return self.variants[0 if on_sphere(group) else 1]

    def factors(self, measured: Measured) -> dict[str, Any]:
        squares, along, long = measured.sums
        held = [state["initial_norm"] for state in measured.states]
        known = torch.stack(held)
        radius = torch.where(known > 0, known, squares.sqrt())
        write_each(held, radius.unbind())
        step_size = torch.where(long == 0, 0.0, measured.h.step_size * radius / long.sqrt())
        moved = (squares - 2 * step_size * along + step_size**2 * long).clamp(min=0)
        return {"step_size": step_size, "back": torch.where(moved == 0, 1.0, radius / moved.sqrt())}


def on_sphere(group: dict[str, Any]) -> bool:
    """Whether the parameters of a group keep their norm."""
    return bool(group.get("hyperball", True))
