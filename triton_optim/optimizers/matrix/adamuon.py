"""AdaMuon."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...core.checks import check_range, check_ranges
from ...core.optimizer import RuleOptimizer
from ...options import Options
from ...spec import State
from ...util.layout import gathered, placed_as
from .muon import Muon, uses_muon
from .pieces import Pieces

TINY = 1e-8  # the authors'


class AdaMuon(Muon):
    r"""AdaMuon: Muon of the signs of its momentum, each element divided by the root of a second moment, and all made as
    long as AdamW's steps are.

    With :math:`m_t` and NS of :class:`Muon`, and the Frobenius norm, for a matrix of :math:`A \times B`:

    .. math::
        O_t &= \operatorname{NS}(\operatorname{sign}(m_t)), \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) O_t^2, \qquad
        \hat O_t = O_t / (\sqrt{v_t} + 10^{-8}) \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma \frac{0.2 \sqrt{A B}}{\lVert \hat O_t \rVert} \hat O_t

    A parameter group with ``"use_muon": False`` is AdamW's, and ``"extra_dims"`` and ``"splits"`` say of which matrices
    the parameters of others consist, as of :class:`Muon`.

    State of a parameter: ``momentum_buffer`` :math:`b` and ``second_momentum_buffer`` :math:`v`, like it; in a group of
    AdamW ``step``, ``exp_avg`` and ``exp_avg_sq``.

    Args:
        params: parameters, named parameters or groups; real, and of two dimensions but where their group says else.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. AdamW's rates fit.
        weight_decay: :math:`\lambda \ge 0`.
        momentum: :math:`\mu \ge 0`.
        nesterov: Nesterov's momentum.
        ns_coefficients: as of :class:`Muon`.
        eps: :math:`\epsilon \ge 0` of :class:`Muon`.
        ns_steps: as of :class:`Muon`.
        beta2: :math:`\beta_2` in [0, 1); the paper's is its momentum.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter has not two dimensions or rows that are not cut.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = triton_optim.AdaMuon([p], lr=0.5, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data.round(decimals=4)
        tensor([[-0.1000, -0.1000],
                [-0.1000, -0.1000]])

    For: Muon's place, with AdamW's learning rates and AdamW's memory.

    Source: Si et al. 2025, Algorithm 1, https://arxiv.org/abs/2507.11005; Nesterov's momentum as in the authors' code.
    """

    option_names = RuleOptimizer.option_names
    adapts = True
    kept_states = (*Muon.kept_states, State("second_momentum_buffer", nonnegative=True))
    signed = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        beta2: float = 0.95,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "beta2": beta2,
        }
        super(Muon, self).__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        super().check_hyperparameters({"adjust_lr_fn": None, **group})
        if uses_muon(group):
            check_ranges(group, "eps")
            check_range("beta2 value", group["beta2"], 0.0, 1.0)

    def adapted(
        self,
        group: dict[str, Any],
        h: Any,
        params: list[Tensor],
        pieces: Pieces,
        updates: list[Tensor],
        states: list[dict[str, Any]],
    ) -> list[Tensor]:
        held = [gathered(state["second_momentum_buffer"]) for state in states]
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in params]
        wide = [update.to(dtypes[k]) for k, update in zip(pieces.owners, updates, strict=True)]
        moments = pieces.averaged(held, torch._foreach_mul(wide, wide), 1 - group["beta2"])
        for p, state, whole in zip(params, states, held, strict=True):
            if state["second_momentum_buffer"] is not whole:
                state["second_momentum_buffer"].copy_(placed_as(p, whole))
        even = torch._foreach_div(wide, torch._foreach_add(torch._foreach_sqrt(moments), TINY))
        lengths = torch._foreach_clamp_min(torch._foreach_norm(even), TINY)
        sizes = [0.2 * (rows * columns) ** 0.5 for rows, columns in pieces.shapes]
        return list(torch._foreach_mul(even, torch._foreach_mul(torch._foreach_reciprocal(lengths), sizes)))
