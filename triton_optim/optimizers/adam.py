"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adam import AdamScalars, adam, adam_amsgrad, adamw, adamw_amsgrad
from ..options import Options
from ..spec import State, Variant

MOMENTS: tuple[State, ...] = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))


class Adam(RuleOptimizer):
    r"""Adam, with torch.optim.Adam's arguments, defaults and state.

    With :math:`g_t` the gradient (plus :math:`\lambda p_{t-1}`, unless the decay is decoupled):

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with :math:`\max_{s \le t} v_s` for :math:`v_t` if ``amsgrad``; decoupled decay multiplies :math:`p_{t-1}` by
    :math:`1 - \gamma\lambda` first.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`, and with
    ``amsgrad`` ``max_exp_avg_sq``; each like the parameter.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1); both numbers or both 1-element tensors.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`; a number or a 1-element tensor.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: decay the parameter, not the gradient (AdamW).
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, or a tensor where ``foreach`` is True and ``capturable`` False.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = triton_optim.Adam([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.data
        tensor([0.9000, 0.9000, 0.9000])

    For: Models without weight decay, such as GANs and reinforcement learning; with decay take AdamW.

    Source: Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980; Reddi et al. 2018,
    https://arxiv.org/abs/1904.09237. As torch's, ``amsgrad`` takes the maximum before the bias correction.
    """

    variants = (
        Variant(adam, MOMENTS),
        Variant(adam_amsgrad, (*MOMENTS, State("max_exp_avg_sq", nonnegative=True))),
        Variant(adamw, MOMENTS),
        Variant(adamw_amsgrad, (*MOMENTS, State("max_exp_avg_sq", nonnegative=True))),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        pair = betas if isinstance(betas, (tuple, list)) else ()  # what is neither is refused below
        for name, value in (("lr", lr), *((f"betas[{i}]", beta) for i, beta in enumerate(pair))):
            if isinstance(value, Tensor) and options.get("foreach") and not options.get("capturable"):
                raise ValueError(
                    f"{name} as a Tensor is not supported for capturable=False and foreach=True, as in torch; got "
                    f"{value}. Leave foreach out: every backend takes a tensor."
                )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "betas", "weight_decay")
        if isinstance(group["betas"][0], Tensor) != isinstance(group["betas"][1], Tensor):
            raise ValueError(
                f"betas must be either both floats or both Tensors, got {group['betas']}. Convert one of them."
            )

    def variant(self, group: dict[str, Any]) -> Variant:
        return self.variants[2 * bool(group["decoupled_weight_decay"]) + bool(group["amsgrad"])]

    def scalars(self, group: dict[str, Any], step: Any) -> AdamScalars:
        return adam_scalars(group, step, group["decoupled_weight_decay"])


def adam_scalars(group: dict[str, Any], step: Any, decoupled: bool) -> AdamScalars:
    """What Adam's rules take; `decoupled` in AdamW's."""
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    return AdamScalars(
        decay=1 - lr * decay if decoupled else decay,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=lr / (1 - beta1**step),
        correction=(1 - beta2**step) ** -0.5,
        eps=group["eps"],
    )


class AdamW(Adam):
    r"""AdamW, with torch.optim.AdamW's arguments, defaults and state: :class:`Adam` with decoupled weight decay.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \gamma\lambda) p_{t-1}
            - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with :math:`\max_{s \le t} v_s` for :math:`v_t` if ``amsgrad``.

    State of a parameter: ``step`` (0-dim float32), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`, and with
    ``amsgrad`` ``max_exp_avg_sq``; each like the parameter.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1); both numbers or both 1-element tensors.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`; a number or a 1-element tensor.
        amsgrad: divide by the largest second moment so far.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range, or a tensor where ``foreach`` is True and ``capturable`` False.

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = triton_optim.AdamW(model.parameters(), lr=1e-3, backend="eager")
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg', 'exp_avg_sq', 'step']

    For: Transformers and most other networks: the first choice, with which others are compared.

    Source: Loshchilov & Hutter 2019, Algorithm 2, https://arxiv.org/abs/1711.05101. As torch's, the decay is scaled by
    the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Checkpoints of older torch lack the key, and those of a common mistake hold Adam's.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
