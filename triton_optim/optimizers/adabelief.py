"""AdaBelief."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adabelief import AdaBeliefScalars, adabelief
from ..options import Options
from ..spec import State


class AdaBelief(RuleOptimizer):
    r"""AdaBelief: Adam that divides by how far gradients are from their mean, in place of how large they are.

    With :math:`g_t` the gradient (plus :math:`\lambda p_{t-1}`, unless the decay is decoupled):

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
            s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    Decoupled decay multiplies :math:`p_{t-1}` by :math:`1 - \gamma\lambda` first.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_var`` :math:`s`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`. It adds up in :math:`s`, where its root counts: 1e-16 does what 1e-8 does in Adam.
        weight_decay: :math:`\lambda \ge 0`.
        decoupled_weight_decay: decay the parameter, not the gradient.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.AdaBelief([p], lr=0.25, betas=(0.5, 0.99), backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.5000, 0.5000])

    For: Images and GANs on which Adam generalizes worse than SGD or is unstable; Adam's settings fit.

    Source: Zhuang et al. 2020, Algorithm 2, https://arxiv.org/abs/2010.07468; decoupled decay is the default of the
    authors' code, whose rectification (RAdam's) is not in the paper's algorithm and not here.
    """

    rule = adabelief
    states = (State("exp_avg"), State("exp_avg_var", nonnegative=True))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")

    def scalars(self, group: dict[str, Any], step: Any) -> AdaBeliefScalars:
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        decoupled = group["decoupled_weight_decay"]
        return AdaBeliefScalars(
            l2=0.0 if decoupled else decay,
            keep=1 - lr * decay if decoupled else 1.0,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            step_size=lr / (1 - beta1**step),
            correction=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )
