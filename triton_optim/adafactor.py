"""Adafactor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .kernels.adafactor import AdafactorScalars, adafactor
from .layout import gathered, placed_as
from .optimizer import RuleOptimizer, check_range


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
        foreach, maximize, differentiable, fused, capturable, backend: see :class:`RuleOptimizer`.

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

    Source: Shazeer & Stern 2018, Algorithms 4 and 5, https://arxiv.org/abs/1804.04235. As torch's: :math:`\gamma` for
    the paper's 0.01, means for sums, :math:`\epsilon_1` as bounds from below, a decoupled decay. Unlike torch's, an
    :math:`\epsilon_1` of None is each parameter's own dtype's, not the first one's.
    """

    rule = adafactor
    option_names = ("foreach", "maximize")
    prologue_names = ("row_var", "col_var", "variance")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        backend: str = "auto",
    ) -> None:
        check_range("learning rate", lr, 0.0)
        check_range("weight_decay value", weight_decay, 0.0)
        for fits, rule, value, usual in (
            (beta2_decay <= 0, "beta2_decay should be <= 0", beta2_decay, -0.8),
            (eps[0] is None or eps[0] >= 0, "epsilon1 should be >= 0", eps[0], None),
            (eps[1] >= 0, "epsilon2 should be >= 0", eps[1], 1e-3),
            (d >= 1, "Clipping threshold d should be >= 1", d, 1.0),
        ):
            if not fits:
                raise ValueError(f"{rule} but is: {value}. The default is {usual}.")
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
        }
        options = {
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
        }
        super().__init__(params, defaults, backend=backend, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> AdafactorScalars:
        lr, bound = group["lr"], step**-0.5
        on_device = isinstance(lr, Tensor) or isinstance(bound, Tensor)
        return AdafactorScalars(
            rho=torch.minimum(*(torch.as_tensor(x, dtype=torch.float64) for x in (lr, bound)))
            if on_device
            else min(lr, bound),
            keep=1 - lr * group["weight_decay"],
            one_minus_beta2=step ** group["beta2_decay"],
        )

    # Of sharded parameters too every rank keeps all of these: they are small.
    def prologue_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if p.dim() < 2:
            return {"variance": torch.zeros(p.shape, dtype=p.dtype, device=p.device)}
        shapes = {"row_var": (*p.shape[:-1], 1), "col_var": (*p.shape[:-2], 1, p.shape[-1])}
        return {name: torch.zeros(shape, dtype=p.dtype, device=p.device) for name, shape in shapes.items()}

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        return [
            placed_as(p, normalized(gathered(p), gathered(g), state, group, h))
            for p, g, state in zip(params, gradients, states, strict=True)
        ]


def normalized(p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], h: AdafactorScalars) -> Tensor:
    r""":math:`\max(\epsilon_2, RMS(p)) u / \max(1, RMS(u) / d)`, as :class:`Adafactor` says; the state is updated."""
    eps1, eps2 = group["eps"]
    eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
    compute = torch.float64 if p.dtype == torch.float64 else torch.float32
    g = g.to(compute)
    if p.dim() < 2:
        variance = averaged(state["variance"], g * g, h.one_minus_beta2)
        divisor = variance.clamp(min=eps1 * eps1).rsqrt_()
    else:
        square = g * g
        row = averaged(state["row_var"], mean(square, -1), h.one_minus_beta2)
        column = averaged(state["col_var"], mean(square, -2), h.one_minus_beta2)
        # The square roots of the factors, not of their product: as many as there are rows and columns.
        by_row = (row / mean(row, -2).clamp(min=eps1)).rsqrt()
        divisor = by_row * column.rsqrt()
        if eps1:
            divisor = divisor.clamp(max=1 / eps1) if torch.is_grad_enabled() else divisor.clamp_(max=1 / eps1)
    update = times(divisor, g)
    scale = rms(p).clamp(min=eps2) / (rms(update) / group["d"]).clamp(min=1)
    return times(update, scale)


def times(x: Tensor, y: Tensor) -> Tensor:
    """The product, in the memory of `x` where autograd does not need that."""
    return x * y if torch.is_grad_enabled() else x.mul_(y)


def averaged(state: Tensor, new: Tensor, weight: Any) -> Tensor:
    """The state moved towards `new` by `weight`, in the dtype of the latter; it is kept in its own."""
    average = state.to(new.dtype).lerp(new, weight.to(new) if isinstance(weight, Tensor) else weight)
    state.copy_(average)
    return average


def mean(x: Tensor, dim: int) -> Tensor:
    return x.sum(dim, keepdim=True) / max(x.shape[dim], 1)  # of nothing it is 0


def rms(x: Tensor) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(x, dtype=compute)
    return norm / math.sqrt(max(x.numel(), 1))
