"""NAdam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.nadam import NAdamScalars, nadam
from ..options import Options
from ..spec import State


class NAdam(RuleOptimizer):
    r"""NAdam, with torch.optim.NAdam's arguments, defaults and state.

    With :math:`g_t` the gradient (plus :math:`\lambda p_{t-1}`, unless the decay is decoupled) and
    :math:`\mu_t = \beta_1 (1 - 0.5 \cdot 0.96^{t \psi})`:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= \frac{\mu_{t+1}}{1 - \prod_{i=1}^{t+1} \mu_i} m_t
            + \frac{1 - \mu_t}{1 - \prod_{i=1}^{t} \mu_i} g_t \\
        p_t &= p_{t-1} - \gamma \frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Decoupled decay multiplies :math:`p_{t-1}` by :math:`1 - \gamma\lambda` first.

    State of a parameter: ``step`` and ``mu_product`` :math:`\prod \mu_i` (0-dim float32), ``exp_avg`` :math:`m`,
    ``exp_avg_sq`` :math:`v`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        momentum_decay: :math:`\psi \ge 0`.
        decoupled_weight_decay: decay the parameter, not the gradient.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.NAdam([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']

    For: Results that were published with torch's or Keras's Nadam; for new work NAdamW is simpler.

    Source: Dozat 2016, Algorithm 2, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ, in torch's form.
    """

    rule = nadam
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))
    option_names = ("maximize", "foreach", "capturable", "differentiable")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay", "momentum_decay")

    def init_scalar_state(self, group: dict[str, Any]) -> dict[str, float]:
        return {"mu_product": 1.0}

    def update_scalar_state(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, mu_product: Any
    ) -> dict[str, Any]:
        return {"mu_product": mu_product * momentum(group, step)}

    def scalars(  # type: ignore[override]
        self, group: dict[str, Any], step: Any, *, mu_product: Any
    ) -> NAdamScalars:
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        decoupled = group["decoupled_weight_decay"]
        mu, next_mu = momentum(group, step), momentum(group, step + 1)
        return NAdamScalars(
            l2=0.0 if decoupled else decay,
            keep=1 - lr * decay if decoupled else 1.0,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            gradient_step=lr * (1 - mu) / (1 - mu_product * mu),
            momentum_step=lr * next_mu / (1 - mu_product * mu * next_mu),
            correction=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )


def momentum(group: dict[str, Any], step: Any) -> Any:
    """The momentum of an update, as the schedule has it."""
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"]))
