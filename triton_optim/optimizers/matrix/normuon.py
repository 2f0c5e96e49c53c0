"""NorMuon."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...core.checks import check_range, check_ranges
from ...core.factored import means, wide_zeros
from ...core.optimizer import RuleOptimizer
from ...options import Options
from ...spec import State
from .muon import Muon, scales_of, uses_muon
from .pieces import Pieces

TINY = 1e-10  # the authors'


def first_sizes(p: Tensor, group: dict[str, Any]) -> Tensor:
    """A number a row of each matrix of a parameter: a column, or a batch of them."""
    return wide_zeros(p, (*(p.shape[:1] if group.get("extra_dims") == "flatten" else p.shape[:-1]), 1))


class NorMuon(Muon):
    r"""NorMuon: Muon whose rows, the neurons, take steps of like size: each is divided by a running mean of its size.

    With :math:`O_t = \operatorname{NS}(m_t)` of :class:`Muon`, and Frobenius norms:

    .. math::
        r_t &= \beta_2 r_{t-1} + (1 - \beta_2) \operatorname{mean}_{\text{row}} O_t^2, \qquad
        \hat O_t = O_t / (\sqrt{r_t} + 10^{-10}) \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma s \frac{\lVert O_t \rVert}{\lVert \hat O_t \rVert} \hat O_t

    A parameter group with ``"use_muon": False`` is AdamW's, and ``"extra_dims"`` and ``"splits"`` say of which matrices
    the parameters of others consist, as of :class:`Muon`.

    State of a parameter: ``momentum_buffer`` :math:`b`, like it, and ``second_momentum_buffer`` :math:`r`, a column in
    float32 or wider, of a batch of matrices one each; in a group of AdamW ``step``, ``exp_avg`` and ``exp_avg_sq``.

    Args:
        params: parameters, named parameters or groups; real, and of two dimensions but where their group says else.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        weight_decay: :math:`\lambda \ge 0`.
        momentum: :math:`\mu \ge 0`.
        nesterov: Nesterov's momentum.
        ns_coefficients: as of :class:`Muon`.
        eps: :math:`\epsilon \ge 0` of :class:`Muon`.
        ns_steps: as of :class:`Muon`.
        adjust_lr_fn: as of :class:`Muon`, for s; with ``"match_rms_adamw"`` steps are as long as the paper's.
        beta2: :math:`\beta_2` in [0, 1).
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter has not two dimensions or rows that are not cut.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = triton_optim.NorMuon(triton_optim.muon_param_groups(model), lr=0.02, backend="eager")
        >>> model(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'second_momentum_buffer']

    For: Muon's place, with rows that move alike; records of modded-nanogpt are set with it.

    Source: Li et al. 2025, Algorithm 1, https://arxiv.org/abs/2510.05491. As in the authors' code, Nesterov's momentum
    is the default, and an update keeps the norm that :math:`O_t` has, where the paper gives it an RMS of 0.2.
    """

    option_names = RuleOptimizer.option_names
    adapts = True
    kept_states = (*Muon.kept_states, State("second_momentum_buffer", first_sizes))

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
        adjust_lr_fn: str | None = None,
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
            "adjust_lr_fn": adjust_lr_fn,
            "beta2": beta2,
        }
        super(Muon, self).__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        super().check_hyperparameters(group)
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
        held = [state["second_momentum_buffer"] for state in states]
        wide = [update.to(held[k].dtype) for k, update in zip(pieces.owners, updates, strict=True)]
        sizes = pieces.averaged(held, means(torch._foreach_mul(wide, wide), -1), 1 - group["beta2"])
        even = torch._foreach_div(wide, torch._foreach_add(torch._foreach_sqrt(sizes), TINY))
        lengths = torch._foreach_clamp_min(torch._foreach_norm(even), TINY)
        factors = torch._foreach_mul(torch._foreach_norm(wide), scales_of(group, pieces))
        return list(torch._foreach_mul(even, torch._foreach_div(factors, lengths)))
