"""Sophia-G."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.checks import check_range, check_ranges
from ..core.optimizer import RuleOptimizer
from ..kernels.rules.sophia import SophiaGScalars, sophia
from ..options import Options
from ..spec import State


class SophiaG(RuleOptimizer):
    r"""Sophia-G: the momentum over an estimate of the Hessian's diagonal, clipped elementwise.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        p_t &= (1 - \gamma\lambda) p_{t-1}
            - \gamma \operatorname{sign}(m_t) \min\left(\frac{|m_t|}{\rho B h + 10^{-15}}, 1\right)

    Every :math:`k` steps (10 in the paper) :meth:`update_hessian` takes in the gradient :math:`\hat g` of a batch whose
    labels were sampled from the model's own output: :math:`h \leftarrow \beta_2 h + (1 - \beta_2) \hat g^2`. Until the
    first, steps are those of the momentum's sign.

    State of a parameter: ``exp_avg`` :math:`m`, ``hessian`` :math:`h`. As torch.sign, the sign of NaN is 0.

    Args:
        params: parameters, named parameters or groups.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        rho: :math:`\rho \ge 0`. The paper tunes it so that between 10 and 50 % of the elements are not clipped.
        weight_decay: :math:`\lambda \ge 0`.
        bs: :math:`B \ge 1`, over how many samples (of a language model, tokens) the loss is a mean.
        options: see :class:`Options`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = triton_optim.SophiaG(model.parameters(), lr=0.1, bs=8, backend="eager")
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> for step in range(20):
        ...     if step % 10 == 0:
        ...         sampled = torch.distributions.Categorical(logits=model(x)).sample()
        ...         torch.nn.functional.cross_entropy(model(x), sampled).backward()
        ...         optimizer.update_hessian()
        ...         optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    For: Language models from which labels can be sampled for the Hessian. A comparison
    (https://arxiv.org/abs/2509.01440) saw it diverge in long runs.

    Source: Liu et al. 2023, Algorithms 2 and 3, https://arxiv.org/abs/2305.14342, in the form of the authors' code.
    """

    rule = sophia
    states = (State("exp_avg"), State("hessian", nonnegative=True))
    counts_steps = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 1e-1,
        bs: int = 5120,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay, "bs": bs}
        super().__init__(params, defaults, **options)

    def update_hessian(self) -> None:
        """Take the gradients that the parameters have, which are of sampled labels, into the estimate of the Hessian.

        Parameters and momenta stay as they are. The gradients are neither clipped nor unscaled; ``ema_decay`` counts
        it as a step.
        """
        limit, self.max_grad_norm = self.max_grad_norm, None
        self.scalars = self._scalars_of_an_estimate  # type: ignore[method-assign]
        self.engine.plan = None  # where the device forms scalars, it knows how to form a step's
        try:
            self.engine.step()
        finally:
            del self.scalars
            self.engine.plan = None
            self.max_grad_norm = limit

    def _scalars_of_an_estimate(self, group: dict[str, Any], step: Any) -> SophiaGScalars:
        return type(self).scalars(self, group, step)._replace(estimating=1.0)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "betas", "rho", "weight_decay")
        check_range("bs value", group["bs"], 1.0)

    def scalars(self, group: dict[str, Any], step: Any) -> SophiaGScalars:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        return SophiaGScalars(
            estimating=0.0,
            lr=lr,
            keep=1 - lr * group["weight_decay"],
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            scale=group["rho"] * group["bs"],
        )
