"""NovoGrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.factored import wide_zeros
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.novograd import NovoGradScalars, novograd, novograd_norm
from ..options import Options
from ..spec import Measured, State
from ..util.in_place import write_each


class NovoGrad(RuleOptimizer):
    r"""NovoGrad: momentum of gradients that are divided by a running mean of their norms, one number a parameter.

    With norms over a parameter:

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \lVert g_t \rVert^2,
            \quad \text{while } v_{t-1} = 0 \quad v_t = \lVert g_t \rVert^2 \\
        m_t &= \beta_1 m_{t-1} + \left(\frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1}\right), \qquad
        p_t = p_{t-1} - \gamma m_t

    With ``grad_averaging`` what is added to the momentum is multiplied by :math:`1 - \beta_1`.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, like the parameter, and ``norm_sq``
    :math:`v`, 0-dim and float32 or wider.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        grad_averaging: whether the momentum is an average.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = triton_optim.NovoGrad([p], lr=0.5, backend="eager")
        >>> (7 * p.sum()).backward()
        >>> optimizer.step()
        >>> p.data
        tensor([-0.2500, -0.2500, -0.2500, -0.2500])

    For: Speech recipes that name it; one state, as the second moment is one number a parameter.

    Source: Ginsburg et al. 2019, Algorithm 1, https://arxiv.org/abs/1905.11286; as in the authors' code :math:`v`
    begins with the first gradient that is not 0. That code has :math:`\epsilon` in the root.
    """

    rule = novograd
    measure = novograd_norm
    states = (State("exp_avg"),)
    kept_states = (State("norm_sq", lambda p, _: wide_zeros(p, ())),)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> NovoGradScalars:
        beta1, beta2 = group["betas"]
        return NovoGradScalars(
            scale=1.0,
            lr=group["lr"],
            l2=group["weight_decay"],
            beta1=beta1,
            share=1 - beta1 if group["grad_averaging"] else 1.0,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=group["eps"],
        )

    def factors(self, measured: Measured) -> dict[str, Any]:
        (squares,), h = measured.sums, measured.h
        held = [state["norm_sq"] for state in measured.states]
        known = torch.stack(held).to(squares)
        norm_sq = torch.where(known == 0, squares, h.beta2 * known + h.one_minus_beta2 * squares)
        write_each(held, norm_sq.unbind())
        return {"scale": 1 / (norm_sq.sqrt() + h.eps)}
