"""SparseAdam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_positive, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.adam import AdamScalars, adam
from ..options import OwnOptions
from ..spec import State


class SparseAdam(RuleOptimizer):
    r"""Adam for sparse gradients, with torch.optim.SparseAdam's arguments, defaults and state.

    Of the elements that a gradient holds (those of its entries, zeros among them; entries of one place are added up):

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        p &\leftarrow p - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{v} + \epsilon}

    All others keep their value and their moments. :math:`t` counts the steps of the parameter, not of the element.

    State of a parameter: ``step`` (an int), ``exp_avg`` :math:`m`, ``exp_avg_sq`` :math:`v`; each like the parameter.

    Args:
        params: dense parameters, named parameters or groups, as of ``nn.Embedding(sparse=True)``.
        lr: :math:`\gamma > 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon > 0`.
        maximize, options: see :class:`Options`. The step runs eagerly.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is sparse or complex.
        RuntimeError: a gradient is dense (in :meth:`step`), or another backend than ``"eager"`` is pinned.

    Example:
        >>> import torch, triton_optim
        >>> embedding = torch.nn.Embedding(1000, 8, sparse=True)
        >>> optimizer = triton_optim.SparseAdam(embedding.parameters(), lr=0.1)
        >>> before = embedding.weight.detach().clone()
        >>> embedding(torch.tensor([3, 5, 3])).sum().backward()
        >>> optimizer.step()
        >>> (embedding.weight != before).any(dim=1).nonzero().flatten()
        tensor([3, 5])

    For: Embeddings with ``sparse=True`` of which a batch reads few rows.

    Source: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, section 2's efficient form, in which :math:`\epsilon` is
    not corrected; which elements move is torch's.
    """

    rule = adam
    states = (State("exp_avg"), State("exp_avg_sq", nonnegative=True))
    option_names = ("maximize",)
    takes_dense_gradients = False
    step_is_tensor = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[OwnOptions],
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps},
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
            **options,
        )
        if lr == 0:  # later a schedule may pass through it
            raise ValueError(f"Invalid learning rate: {lr}. It must be greater than 0.")

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "betas")
        check_positive("epsilon", group["eps"])

    def check_parameter(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        for found, rule in (
            (p.is_sparse, "requires dense parameter tensors"),
            (p.is_complex(), "does not support complex parameters"),
        ):
            if found:
                kind = f"{p.dtype}, {p.layout}"
                raise ValueError(f"SparseAdam {rule}; parameter {index} is {kind}. Give it to another optimizer.")
        super().check_parameter(index, p, group)

    def sparse_gradients(self, group: dict[str, Any]) -> str:
        return "rows"

    def scalars(self, group: dict[str, Any], step: Any) -> AdamScalars:
        beta1, beta2 = group["betas"]
        return AdamScalars(
            decay=0.0,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            step_size=group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step),
            correction=1.0,
            eps=group["eps"],
        )
