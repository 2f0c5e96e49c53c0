"""Adafactor as the paper has it, with a step size of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_range, check_ranges
from ..core.factored import averaged, by_portions, clipped, factored_states, inverse_roots
from ..core.optimizer import RuleOptimizer
from ..core.shards import Shards
from ..kernels.rules.adafactor import AdafactorRelativeScalars, adafactor_relative
from ..options import Options
from ..spec import State
from ..util.hyperparameters import exact_number
from ..util.layout import local, with_local
from .came import check_eps, check_threshold


class AdafactorRelative(RuleOptimizer):
    r"""Adafactor that needs no learning rate, with the arguments, defaults and state of transformers' Adafactor.

    Its step size goes with the parameter. With :math:`w_t = t^\tau`, for a matrix :math:`g_t` (more than two dimensions
    are a batch of matrices):

    .. math::
        r_t &= (1 - w_t) r_{t-1} + w_t \operatorname{mean}_{\text{row}} (g_t^2 + \epsilon_1), \qquad
        c_t = (1 - w_t) c_{t-1} + w_t \operatorname{mean}_{\text{column}} (g_t^2 + \epsilon_1) \\
        v_t &= r_t c_t / \operatorname{mean} r_t, \qquad
        u_t = g_t / \sqrt{v_t}, \qquad
        \alpha_t = \rho_t \max(\epsilon_2, \operatorname{RMS}(p_{t-1})) \\
        p_t &= (1 - \alpha_t \lambda) p_{t-1} - \alpha_t u_t / \max(1, \operatorname{RMS}(u_t) / d)

    and for a vector :math:`v_t = (1 - w_t) v_{t-1} + w_t (g_t^2 + \epsilon_1)`. Without a learning rate :math:`\rho_t`
    is :math:`\min(10^{-2}, 1 / \sqrt t)`, with ``warmup_init`` :math:`\min(10^{-6} t, 1 / \sqrt t)`; else it is the
    learning rate. With :math:`\beta_1` a running mean of the updates, step sizes included, is subtracted.

    State of a parameter: ``step`` (0-dim float32); in float32 or wider ``exp_avg_sq_row`` :math:`r` and
    ``exp_avg_sq_col`` :math:`c`, of a vector ``exp_avg_sq`` :math:`v`; with :math:`\beta_1` ``exp_avg``, like the
    parameter.

    Args:
        params: parameters, named parameters or groups; real ones.
        lr: :math:`\rho \ge 0`; a number or a 1-element tensor. None for the paper's steps, which a scheduler can't
            multiply.
        eps: :math:`(\epsilon_1, \epsilon_2)`, each :math:`\ge 0`.
        clip_threshold: :math:`d > 0`.
        decay_rate: :math:`\tau \le 0`.
        beta1: :math:`\beta_1` in [0, 1), or None for no momentum.
        weight_decay: :math:`\lambda \ge 0`.
        scale_parameter: whether the step size goes with the parameter; else :math:`\alpha_t = \rho_t`.
        relative_step: whether the paper's steps are taken; None where there is no learning rate.
        warmup_init: whether these begin small.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, or ``relative_step`` and the learning rate say different things.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.AdafactorRelative([p], backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.9900, 0.9900])

    For: T5 and other recipes of transformers' Adafactor, whose step size goes with the size of the weights.

    Source: Shazeer & Stern 2018, Algorithms 4 to 6, https://arxiv.org/abs/1804.04235, with means for sums. As
    transformers', the decay is decoupled and multiplied by the step size.
    """

    rule = adafactor_relative
    kept_states = (
        State("exp_avg", lambda _, group: None if group["beta1"] is None else 0.0),
        *factored_states("exp_avg_sq"),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        lr, relative = group["lr"], group["relative_step"]
        check_ranges(group, "weight_decay")
        if lr is not None:
            check_ranges(group, "lr")
        if relative is not None and bool(relative) == (lr is not None):
            raise ValueError(
                f"lr={lr} and relative_step={relative}: relative steps are taken where there is no learning rate, and "
                "only there. Leave relative_step out."
            )
        if group["warmup_init"] and lr is not None:
            raise ValueError(
                f"warmup_init=True with lr={lr}: it is relative steps that begin small. Leave one of them out."
            )
        check_eps(group["eps"])
        check_threshold(group["clip_threshold"])
        if not group["decay_rate"] <= 0:
            raise ValueError(
                f"Invalid decay_rate: {group['decay_rate']}. It must be at most 0, so that later gradients weigh less; "
                "the default is -0.8."
            )
        if group["beta1"] is not None:
            check_range("beta1 value", group["beta1"], 0.0, 1.0)

    def scalars(self, group: dict[str, Any], step: Any) -> AdafactorRelativeScalars:
        rho = group["lr"]
        if rho is None:
            first, bound = 1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5
            on_device = isinstance(bound, Tensor)
            rho = torch.minimum(exact_number(first).to(bound), bound) if on_device else min(first, bound)
        return AdafactorRelativeScalars(
            rho=rho,
            one_minus_beta1=0.0 if group["beta1"] is None else 1 - group["beta1"],
            one_minus_beta2=step ** group["decay_rate"],
            weight_decay=group["weight_decay"],
        )

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        return by_portions(steps_of, group, h, params, gradients, states)


def steps_of(
    group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
) -> list[Tensor]:
    """What is subtracted, as :class:`AdafactorRelative` says; the states are updated."""
    shards, parts = Shards(params), list(map(local, params))
    computed_in = [torch.promote_types(p.dtype, torch.float32) for p in params]
    wide = [local(g).to(dtype) for g, dtype in zip(gradients, computed_in, strict=True)]
    squares = list(torch._foreach_add(torch._foreach_mul(wide, wide), group["eps"][0]))
    roots = inverse_roots(shards, squares, states, "exp_avg_sq", h.one_minus_beta2)
    updates = list(clipped(shards, torch._foreach_mul(roots, wide), group["clip_threshold"]))
    sizes: list[Any] = [h.rho] * len(params)
    if group["scale_parameter"]:
        norms = [torch.linalg.vector_norm(p, dtype=dtype) for p, dtype in zip(parts, computed_in, strict=True)]
        lengths = torch._foreach_div(shards.norms(norms), shards.roots)
        sizes = list(torch._foreach_mul(torch._foreach_clamp_min(lengths, group["eps"][1]), h.rho))
    updates = [(update * size).to(update.dtype) for update, size in zip(updates, sizes, strict=True)]
    if group["beta1"] is not None:
        updates = list(averaged([local(state["exp_avg"]) for state in states], updates, h.one_minus_beta1))
    decay = h.weight_decay
    if isinstance(decay, Tensor) or decay != 0:
        updates = [u + decay_of(p.to(u.dtype), size * decay) for p, u, size in zip(parts, updates, sizes, strict=True)]
    return [with_local(p, update) for p, update in zip(params, updates, strict=True)]


def decay_of(p: Tensor, share: Any) -> Tensor:
    """The share of the parameter that is subtracted, too. 0 leaves no trace of it, though 0 times infinity is NaN."""
    return torch.where(share == 0, 0.0, share * p) if isinstance(share, Tensor) else share * p
