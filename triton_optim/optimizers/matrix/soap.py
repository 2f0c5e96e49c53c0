"""SOAP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...core.checks import check_count, check_range, check_ranges
from ...core.optimizer import RuleOptimizer
from ...kernels.rules.muon import muon
from ...options import Options
from ...util.layout import placed_as
from .eigenbases import (
    SIDES,
    BasisScalars,
    Batch,
    averaged_squares,
    batches,
    host_step,
    in_order,
    iterated,
    moment,
    orthogonal,
    rows_of,
    square_states,
)

TINY = 1e-30  # the authors'


class SOAP(RuleOptimizer):
    r"""SOAP: Adam in the eigenbases of Shampoo's preconditioners, which turn slowly.

    For a matrix :math:`g_t`, from the second step on, with :math:`k = t - 1`:

    .. math::
        \tilde g_t &= Q_L^\top g_t Q_R, \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \tilde g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde g_t^2 \\
        p_t &= (1 - \gamma\lambda) \left( p_{t-1} - \gamma \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k}
            Q_L \frac{m_t}{\sqrt{v_t} + \epsilon} Q_R^\top \right) \\
        L_t &= \beta_s L_{t-1} + (1 - \beta_s) g_t g_t^\top, \qquad
        R_t = \beta_s R_{t-1} + (1 - \beta_s) g_t^\top g_t

    The first step makes no update. It forms L and R, and their eigenvectors :math:`Q_L` and :math:`Q_R`, so that no
    gradient is ever seen in a basis that was made of it. After every ``precondition_frequency`` updates the columns of
    :math:`Q_L` are sorted by :math:`\operatorname{diag}(Q_L^\top L Q_L)`, those of the largest first, and v with them;
    Q of the QR decomposition of :math:`L Q_L` takes their place, and m is carried over to the new basis. So is
    :math:`Q_R`.

    A parameter of more than two dimensions is the matrix of its first dimension by all others: of a convolution the
    outputs by inputs and kernel. A side that is longer than ``max_precond_dim``, or 1, has no preconditioner: its basis
    is the identity. Vectors and numbers have none on either side, so that SOAP is Adam, with a first step that is left
    out; with ``precondition_1d`` vectors have :math:`Q_L`.

    Matrices of one shape are updated together, in float32 (float64 parameters: float64), whatever the dtype of the
    parameter. A step takes somewhat longer than one of :class:`Muon` in float32, one with new bases several times as
    long. On CUDA the host waits in the first step of a parameter, for its eigenvectors; in others only with
    ``capturable``, or where betas are tensors on the device: which steps find new bases is chosen on the host. For the
    same reason a step can't be captured into a CUDA graph.

    State of a parameter: ``step`` (0-dim float32), one more than its updates; ``exp_avg`` :math:`m` and ``exp_avg_sq``
    :math:`v`, of its shape; of each side that has a preconditioner ``L`` and ``Q_L``, ``R`` and ``Q_R``. All are
    float32 or wider.

    Args:
        params: parameters, named parameters or groups; real ones.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        shampoo_beta: :math:`\beta_s` in [0, 1); None, which the authors write as -1, for :math:`\beta_2`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        precondition_frequency: after so many updates there are new bases; an int of 1 or more.
        max_precond_dim: the longest side that has a preconditioner; an int of 0 or more. With 0 SOAP is Adam.
        precondition_1d: whether vectors have one.
        normalize_grads: divide each parameter's update by its root mean square.
        correct_bias: False leaves out the roots and powers of the betas.
        options: see :class:`Options`. ``state_dtype`` is refused: its states are the prologue's.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: a parameter is complex, or the step is captured into a CUDA graph (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = triton_optim.SOAP(model.parameters(), backend="eager")
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[model.weight].items() if name in ("L", "Q_R")}
        {'L': (3, 3), 'Q_R': (4, 4)}
        >>> sorted(optimizer.state[model.bias])
        ['exp_avg', 'exp_avg_sq', 'step']

    For: Language models at sizes where Shampoo's memory fits: fewer steps than AdamW's to the same loss, each of them
    longer.

    Source: Vyas et al. 2024, Algorithms 3 and 4, https://arxiv.org/abs/2409.11321; the first step, the order of the
    eigenvectors and the place of the decay as in the authors' code, which has a preconditioner for each dimension.
    """

    rule = muon
    kept_states = (
        moment("exp_avg"),
        moment("exp_avg_sq", nonnegative=True),
        *square_states("{}"),
        *square_states("Q_{}", unit=True),
    )
    ordered: ClassVar[bool] = True  # whether eigenvectors are sorted when the bases turn

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "precondition_1d": precondition_1d,
            "normalize_grads": normalize_grads,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "betas", "eps", "weight_decay")
        if group["shampoo_beta"] is not None:
            check_range("shampoo_beta value", group["shampoo_beta"], 0.0, 1.0)
        check_count("precondition_frequency", group["precondition_frequency"], 1)
        check_count("max_precond_dim", group["max_precond_dim"], 0)

    def scalars(self, group: dict[str, Any], step: Any) -> BasisScalars:
        later = (step > 1) * 1.0
        size, (beta1, beta2) = group["lr"], group["betas"]
        keep = 1 - later * size * group["weight_decay"]
        if group["correct_bias"]:
            updates = step - later  # the first makes none
            size = size * (1 - beta2**updates) ** 0.5 / (1 - beta1**updates)
        return BasisScalars(lr=size * keep, keep=keep, step=step)  # the decay comes after the update

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        updates, made = host_step(self, h, params) - 1, list(gradients)
        for own, batch in batches(params, gradients, states):
            if updates == 0:
                self.begin(batch, group)
                update = torch.zeros_like(batch.gradients)
            else:
                update = adam_in_bases(batch, group)
                self.accumulate(batch, group)
                if updates % group["precondition_frequency"] == 0:
                    self.turn(batch)
            for i, u in zip(own, update.unbind(), strict=True):
                made[i] = placed_as(params[i], u.view(params[i].shape))
        return made

    def begin(self, batch: Batch, group: dict[str, Any]) -> None:
        """Form the preconditioners and their eigenvectors."""
        self.accumulate(batch, group)
        batch.begin()

    def accumulate(self, batch: Batch, group: dict[str, Any]) -> None:
        """Take a gradient into the preconditioners."""
        beta = shampoo_beta_of(group)
        for side in batch.sides:
            x = rows_of(batch.gradients, side)
            batch.keep(side, averaged_squares(batch.kept(side), x, beta, 1 - beta))

    def turn(self, batch: Batch) -> None:
        """Take the next bases, and bring the moments into them."""
        moments, squares, longer = batch.out_of_bases(batch.moments("exp_avg")), batch.moments("exp_avg_sq"), {}
        for side in batch.sides:
            longer[side], order = iterated(batch.kept(side), batch.bases[side], self.ordered)
            if order is not None:
                squares = in_order(squares, order, SIDES.index(side) - 2)
        batch.turn(batch.decomposed(longer, orthogonal))
        batch.keep_moments("exp_avg", batch.into_bases(moments))
        batch.keep_moments("exp_avg_sq", squares)


def adam_in_bases(batch: Batch, group: dict[str, Any]) -> Tensor:
    """The update of Adam without bias corrections, made in the bases; the moments are updated."""
    beta1, beta2 = map(float, group["betas"])
    rotated = batch.rotated = batch.into_bases(batch.gradients)
    moments = torch.lerp(batch.moments("exp_avg"), rotated, 1 - beta1)
    squares = torch.addcmul(beta2 * batch.moments("exp_avg_sq"), rotated, rotated, value=1 - beta2)
    batch.keep_moments("exp_avg", moments)
    batch.keep_moments("exp_avg_sq", squares)
    update = batch.out_of_bases(moments / (squares.sqrt() + group["eps"]))
    if group["normalize_grads"]:
        update = update / (update.square().mean((-2, -1), keepdim=True).sqrt() + TINY)
    return update


def shampoo_beta_of(group: dict[str, Any]) -> float:
    """The beta of the preconditioners."""
    return float(group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"])
