"""Adafactor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.factored import averaged, by_portions, in_place, means
from ..core.optimizer import RuleOptimizer
from ..core.shards import Shards
from ..kernels.rules.adafactor import AdafactorScalars, adafactor
from ..options import Options
from ..spec import State
from ..util.hyperparameters import exact_number
from ..util.layout import local, with_local


def zeros(p: Tensor, shape: Sequence[int]) -> Tensor:
    """A state of this shape in the parameter's dtype, as torch's."""
    return torch.zeros(shape, dtype=p.dtype, device=p.device)


class Adafactor(RuleOptimizer):
    r"""Adafactor, with torch.optim.Adafactor's arguments, defaults and state: a second moment kept as its rows' and
    columns' means.

    With :math:`w_t = t^\tau`, for a matrix :math:`g_t` (more than two dimensions are a batch of matrices):

    .. math::
        r_t &= (1 - w_t) r_{t-1} + w_t \operatorname{mean}_{\text{row}} g_t^2, \qquad
        c_t = (1 - w_t) c_{t-1} + w_t \operatorname{mean}_{\text{column}} g_t^2 \\
        v_t &= r_t c_t / \max(\operatorname{mean} r_t, \epsilon_1), \qquad
        u_t = g_t / \sqrt{\max(v_t, \epsilon_1^2)} \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \max(\epsilon_2, \operatorname{RMS}(p_{t-1}))
            \min(\gamma, 1 / \sqrt t) \frac{u_t}{\max(1, \operatorname{RMS}(u_t) / d)}

    and for a vector :math:`v_t = (1 - w_t) v_{t-1} + w_t g_t^2`.

    State of a parameter: ``step`` (0-dim float32); ``row_var`` :math:`r` and ``col_var`` :math:`c`, shaped like the
    parameter with the last and the last but one dimension 1; of a vector ``variance`` :math:`v`.

    Args:
        params: parameters, named parameters or groups; real ones.
        lr: :math:`\gamma \ge 0`, bounds the relative step size; a number or a 1-element tensor.
        beta2_decay: :math:`\tau \le 0`.
        eps: :math:`(\epsilon_1, \epsilon_2)`, each :math:`\ge 0`; an :math:`\epsilon_1` of None is the parameter
            dtype's machine epsilon.
        d: the clipping threshold, :math:`\ge 1`.
        weight_decay: :math:`\lambda \ge 0`.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: a parameter is complex (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = triton_optim.Adafactor(model.parameters(), backend="eager")
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[model.weight].items()}
        {'step': (), 'row_var': (2, 1), 'col_var': (1, 4)}

    For: Models whose second moment does not fit: it keeps one number a row and a column. It is torch's form, with a
    learning rate and without momentum.

    Source: Shazeer & Stern 2018, Algorithms 4 and 5, https://arxiv.org/abs/1804.04235. As torch's: :math:`\gamma` for
    the paper's 0.01, means for sums, :math:`\epsilon_1` as bounds from below, a decoupled decay. Unlike torch's, an
    :math:`\epsilon_1` of None is each parameter's own dtype's, not the first one's.
    """

    rule = adafactor
    option_names = ("foreach", "maximize")
    kept_states = (
        State("row_var", lambda p, _: zeros(p, (*p.shape[:-1], 1)) if p.dim() >= 2 else None),
        State("col_var", lambda p, _: zeros(p, (*p.shape[:-2], 1, p.shape[-1])) if p.dim() >= 2 else None),
        State("variance", lambda p, _: zeros(p, p.shape) if p.dim() < 2 else None),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "weight_decay")
        beta2_decay, eps, d = group["beta2_decay"], group["eps"], group["d"]
        for fits, rule, value, usual in (
            (beta2_decay <= 0, "beta2_decay should be <= 0", beta2_decay, -0.8),
            (eps[0] is None or eps[0] >= 0, "epsilon1 should be >= 0", eps[0], None),
            (eps[1] >= 0, "epsilon2 should be >= 0", eps[1], 1e-3),
            (d >= 1, "Clipping threshold d should be >= 1", d, 1.0),
        ):
            if not fits:
                raise ValueError(f"{rule} but is: {value}. The default is {usual}.")

    def scalars(self, group: dict[str, Any], step: Any) -> AdafactorScalars:
        lr, bound = group["lr"], step**-0.5
        on_device = isinstance(lr, Tensor) or isinstance(bound, Tensor)
        return AdafactorScalars(
            rho=torch.minimum(exact_number(lr), exact_number(bound)) if on_device else min(lr, bound),
            keep=1 - lr * group["weight_decay"],
            one_minus_beta2=step ** group["beta2_decay"],
        )

    # Of sharded parameters too every rank keeps all of these: they are small.
    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        return by_portions(normalized, group, h, params, gradients, states)


def normalized(
    group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
) -> list[Tensor]:
    r""":math:`\max(\epsilon_2, RMS(p)) u / \max(1, RMS(u) / d)`, as :class:`Adafactor` says; the states are updated."""
    shards = Shards(params)
    eps1, eps2 = group["eps"]
    floors = [torch.finfo(p.dtype).eps if eps1 is None else eps1 for p in params]
    computed_in = [torch.promote_types(p.dtype, torch.float32) for p in params]
    wide = [local(g).to(dtype) for g, dtype in zip(gradients, computed_in, strict=True)]
    # 1 / sqrt(v), element by element, will take the place of the squares.
    divisors = list(torch._foreach_mul(wide, wide))
    vectors, matrices = shards.vectors, shards.matrices
    wholes, rows, columns = shards.factors(divisors)
    if vectors:
        variances = averaged([states[i]["variance"] for i in vectors], wholes, h.one_minus_beta2)
        bounded = torch._foreach_clamp_min(variances, [floors[i] ** 2 for i in vectors])
        for i, root in zip(vectors, shards.here(torch._foreach_rsqrt(bounded), vectors), strict=True):
            divisors[i] = root
    if matrices:
        rows = averaged([states[i]["row_var"] for i in matrices], rows, h.one_minus_beta2)
        columns = averaged([states[i]["col_var"] for i in matrices], columns, h.one_minus_beta2)
        of_rows = torch._foreach_clamp_min(means(rows, -2), [floors[i] for i in matrices])
        # The square roots of the factors, not of their product: as many as there are rows and columns.
        by_row = shards.here(torch._foreach_rsqrt(torch._foreach_div(rows, of_rows)), matrices, -1)
        by_column = shards.here(torch._foreach_rsqrt(columns), matrices, -2)
        bounds = [1 / floors[i] if floors[i] else math.inf for i in matrices]
        for i, row, column, bound in zip(matrices, by_row, by_column, bounds, strict=True):
            product = torch.mul(row, column, out=None if torch.is_grad_enabled() else divisors[i])
            divisors[i] = in_place(torch.clamp, product, max=bound)
    updates = [in_place(torch.mul, x, g) for x, g in zip(divisors, wide, strict=True)]
    norms = [torch.linalg.vector_norm(local(p), dtype=dtype) for p, dtype in zip(params, computed_in, strict=True)]
    norms = shards.norms([*norms, *torch._foreach_norm(updates)])
    scales = torch._foreach_clamp_min(torch._foreach_div(norms[: len(params)], shards.roots), eps2)
    clips = torch._foreach_div(norms[len(params) :], [group["d"] * root for root in shards.roots])
    scales = torch._foreach_div(scales, torch._foreach_clamp_min(clips, 1.0))
    updates = [in_place(torch.mul, update, scale) for update, scale in zip(updates, scales, strict=True)]
    return [with_local(p, update) for p, update in zip(params, updates, strict=True)]
