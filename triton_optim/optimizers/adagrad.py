"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..buckets.slots import make_states
from ..core.checks import check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adagrad import AdagradScalars, adagrad
from ..options import OptionsAfterForeach
from ..precision.codecs import parameter_codec
from ..spec import State, averages


class Adagrad(RuleOptimizer):
    r"""Adagrad, with torch.optim.Adagrad's arguments, defaults and state.

    With :math:`g_t` the gradient plus :math:`\lambda p_{t-1}`:

    .. math::
        s_t = s_{t-1} + g_t^2, \qquad
        p_t = p_{t-1} - \frac{\gamma}{1 + (t - 1) \eta} \frac{g_t}{\sqrt{s_t} + \epsilon}

    State of a parameter, there from the start: ``step`` (0-dim float32), ``sum`` :math:`s`.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        lr_decay: :math:`\eta \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, added to the gradient as :math:`\lambda p_{t-1}`.
        initial_accumulator_value: :math:`s_0 \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        foreach, options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = triton_optim.Adagrad([p], lr=0.1, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[p])
        ['step', 'sum']

    For: Sparse features and convex losses, for which rates may only fall.

    Source: Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html; the decay of the rate is torch's.
    """

    rule = adagrad
    states = (State("sum", lambda _, group: group["initial_accumulator_value"], nonnegative=True),)
    option_names = ("foreach", "maximize", "differentiable", "fused")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        **options: Unpack[OptionsAfterForeach],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults, foreach=foreach, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # What else there is to save, corrections and averages, the first step makes of the weights that there are then;
        # torch.distributed.checkpoint makes one only where there is no state.
        if not averages(group) and not any(parameter_codec(group, p.dtype).suffixes for p in group["params"]):
            make_states(self, group)

    def share_memory(self) -> None:
        """Move the states to shared memory, as torch.optim.Adagrad does."""
        for group in self.param_groups:
            if not all(p in self.state for p in group["params"]):
                make_states(self, group)
        for state in self.state.values():
            state["sum"].share_memory_()
            state["step"].share_memory_()

    def sparse_gradients(self, group: dict[str, Any]) -> str:
        decay = group["weight_decay"]
        return "rows" if decay == 0 else f"weight_decay={decay} moves elements whose gradient is 0"

    def scalars(self, group: dict[str, Any], step: Any) -> AdagradScalars:
        lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        return AdagradScalars(lr, group["weight_decay"], group["eps"])
