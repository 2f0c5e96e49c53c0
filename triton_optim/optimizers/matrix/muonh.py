"""MuonH."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...core.checks import check_ranges
from ...core.factored import wide_zeros
from ...core.optimizer import RuleOptimizer
from ...kernels.rules.hyperball import MuonHScalars, muonh
from ...options import Options
from ...spec import State, Variant
from ...util.in_place import write_each
from ...util.layout import gathered
from .muon import Muon, uses_muon
from .pieces import Pieces, rows_of

TINY = 1e-10  # the authors'


class MuonH(Muon):
    r"""MuonH: Muon on a sphere. A step is as long, and the matrix after it, as the rate and its first norm say.

    With :math:`O_t = \operatorname{NS}(m_t)` of :class:`Muon` and Frobenius norms, R the one that the matrix has before
    its first step:

    .. math::
        w_t = p_{t-1} - \gamma R \frac{O_t}{\lVert O_t \rVert}, \qquad p_t = R \frac{w_t}{\lVert w_t \rVert}

    A matrix that starts as 0 stays 0. A parameter group with ``"use_muon": False`` is AdamW's, and ``"extra_dims"`` and
    ``"splits"`` say of which matrices the parameters of others consist, each with its own norm, as of :class:`Muon`.
    :class:`AdamH` fits the head of a model.

    State of a parameter: ``momentum_buffer`` :math:`b`, like it, and ``initial_norms`` :math:`R`, a number a matrix in
    float32 or wider; in a group of AdamW ``step``, ``exp_avg`` and ``exp_avg_sq``.

    Args:
        params: parameters, named parameters or groups; real, and of two dimensions but where their group says else.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor. 0.0025 to 0.01 is usual.
        momentum: :math:`\mu \ge 0`.
        nesterov: Nesterov's momentum.
        ns_coefficients: as of :class:`Muon`.
        eps: :math:`\epsilon \ge 0` of :class:`Muon`.
        ns_steps: as of :class:`Muon`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter has not two dimensions or rows that are not cut.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = triton_optim.MuonH([p], lr=0.1, backend="eager")
        >>> p[0].sum().backward()
        >>> optimizer.step()
        >>> print(f"{p.detach().norm() ** 2:.4f}")
        2.0000

    For: Muon without a weight decay to tune: steps of a set length on a sphere, for hidden layers of any width and
    depth.

    Source: Wen et al. 2026, https://arxiv.org/abs/2606.16899.
    """

    variants = (Variant(muonh, (), prologue=True), *Muon.variants[1:])
    option_names = RuleOptimizer.option_names
    adapts = True
    kept_states = (
        *Muon.kept_states,
        State("initial_norms", lambda p, group: wide_zeros(p, (len(rows_of(p.shape, group)),))),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
        }
        super(Muon, self).__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        if uses_muon(group):
            check_ranges(group, "eps")
            group = {"adjust_lr_fn": None, "weight_decay": 0.0, **group}
            if group["weight_decay"] != 0:
                raise ValueError(
                    f"Invalid weight_decay value: {group['weight_decay']}. A matrix that keeps its norm does not "
                    'decay: leave it out, or give the parameter to AdamW, in a group with "use_muon": False.'
                )
        super().check_hyperparameters(group)

    def scalars(self, group: dict[str, Any], step: Any) -> Any:
        return MuonHScalars(lr=group["lr"]) if uses_muon(group) else super().scalars(group, step)

    def adapted(
        self,
        group: dict[str, Any],
        h: Any,
        params: list[Tensor],
        pieces: Pieces,
        updates: list[Tensor],
        states: list[dict[str, Any]],
    ) -> list[Tensor]:
        whole = [gathered(p).to(torch.promote_types(p.dtype, torch.float32)) for p in params]
        matrices = pieces.cut(whole)
        held = [state["initial_norms"] for state in states]
        found = iter(torch._foreach_norm(matrices))
        now = [torch.stack([next(found) for _ in known]) if len(known) else known for known in held]
        radii = [torch.where(known > 0, known, norms) for known, norms in zip(held, now, strict=True)]
        write_each(held, radii)
        each = [radius for own in radii for radius in own.unbind()]
        directions = [u.to(m.dtype) for u, m in zip(updates, matrices, strict=True)]
        lengths = torch._foreach_clamp_min(torch._foreach_norm(directions), TINY)
        steps = torch._foreach_mul(torch._foreach_div(each, lengths), h.lr)
        moved = torch._foreach_sub(matrices, torch._foreach_mul(directions, steps))
        back = torch._foreach_div(each, torch._foreach_clamp_min(torch._foreach_norm(moved), TINY))
        return list(torch._foreach_sub(matrices, torch._foreach_mul(moved, back)))
