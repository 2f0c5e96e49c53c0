"""CAME."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_betas, check_range, check_ranges
from ..core.factored import averaged, by_portions, clipped, factored_states, inverse_roots
from ..core.optimizer import RuleOptimizer
from ..core.shards import Shards
from ..kernels.rules.came import CameScalars, came
from ..options import Options
from ..spec import State
from ..util.layout import local, with_local


class CAME(RuleOptimizer):
    r"""CAME: Adafactor's factored second moment, and momentum that is trusted where it agrees with its updates.

    With :math:`\operatorname{F}_\beta(x)` for running means r of the rows and c of the columns of x, and their product
    :math:`r c / \operatorname{mean} r`, for a matrix :math:`g_t` (more than two dimensions are a batch of matrices):

    .. math::
        u_t &= g_t / \sqrt{\operatorname{F}_{\beta_2}(g_t^2 + \epsilon_1)}, \qquad
        \hat u_t = u_t / \max(1, \operatorname{RMS}(u_t) / d) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \hat u_t, \qquad
        s_t = \operatorname{F}_{\beta_3}((\hat u_t - m_t)^2 + \epsilon_2) \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma m_t / \sqrt{s_t}

    and for a vector F is the running mean itself, and :math:`p_t = (1 - \gamma\lambda) p_{t-1} - \gamma m_t`.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, like the parameter; the means of F in float32
    or wider: ``exp_avg_sq_row``, ``exp_avg_sq_col``, ``exp_avg_res_row`` and ``exp_avg_res_col``; of a vector
    ``exp_avg_sq``.

    Args:
        params: parameters, named parameters or groups; real ones.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        eps: :math:`(\epsilon_1, \epsilon_2)`, each :math:`\ge 0`.
        clip_threshold: :math:`d > 0`.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = triton_optim.CAME(model.parameters(), backend="eager")
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[model.weight].items() if "row" in name}
        {'exp_avg_sq_row': (2,), 'exp_avg_res_row': (2,)}

    For: Adafactor's place, with one momentum more, where it is unstable or slower than Adam.

    Source: Luo et al. 2023, Algorithm 2, https://arxiv.org/abs/2307.02047, with means for sums, and vectors as in the
    authors' code.
    """

    rule = came
    kept_states = (State("exp_avg"), *factored_states("exp_avg_sq"), *factored_states("exp_avg_res", vectors=False))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "betas": betas,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "weight_decay")
        check_betas(group["betas"], 3)
        check_eps(group["eps"])
        check_threshold(group["clip_threshold"])

    def scalars(self, group: dict[str, Any], step: Any) -> CameScalars:
        lr, (beta1, beta2, beta3) = group["lr"], group["betas"]
        return CameScalars(
            lr=lr,
            keep=1 - lr * group["weight_decay"],
            one_minus_beta1=1 - beta1,
            one_minus_beta2=1 - beta2,
            one_minus_beta3=1 - beta3,
        )

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        return by_portions(trusted, group, h, params, gradients, states)


def trusted(
    group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
) -> list[Tensor]:
    r""":math:`m / \sqrt s`, as :class:`CAME` says; the states are updated."""
    shards = Shards(params)
    wide = [local(g).to(torch.promote_types(p.dtype, torch.float32)) for p, g in zip(params, gradients, strict=True)]
    squares = list(torch._foreach_add(torch._foreach_mul(wide, wide), group["eps"][0]))
    roots = inverse_roots(shards, squares, states, "exp_avg_sq", h.one_minus_beta2)
    updates = clipped(shards, torch._foreach_mul(roots, wide), group["clip_threshold"])
    momenta = averaged([local(state["exp_avg"]) for state in states], updates, h.one_minus_beta1)
    results, matrices = list(momenta), shards.matrices
    if matrices:
        own = [momenta[i] for i in matrices]
        apart = torch._foreach_sub([updates[i] for i in matrices], own)
        squares = list(torch._foreach_add(torch._foreach_mul(apart, apart), group["eps"][1]))
        of_matrices = [states[i] for i in matrices]
        roots = inverse_roots(shards.of_matrices(), squares, of_matrices, "exp_avg_res", h.one_minus_beta3)
        for i, update in zip(matrices, torch._foreach_mul(roots, own), strict=True):
            results[i] = update
    return [with_local(p, update) for p, update in zip(params, results, strict=True)]


def check_eps(eps: Any) -> None:
    """Raise ValueError unless both are at least 0."""
    for index, value in enumerate(eps):
        check_range(f"epsilon value at index {index}", value, 0.0)


def check_threshold(threshold: Any) -> None:
    """Raise ValueError unless updates are clipped to something."""
    if not threshold > 0:
        raise ValueError(f"Invalid clip_threshold: {threshold}. It must be above 0; the default is 1.0.")
