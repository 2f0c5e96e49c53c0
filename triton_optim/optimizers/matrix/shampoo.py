"""Shampoo."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...core.checks import check_count, check_range, check_ranges
from ...core.optimizer import RuleOptimizer
from ...kernels.rules.muon import muon
from ...options import Options
from ...spec import State
from ...util.layout import placed_as
from .eigenbases import (
    BasisScalars,
    Batch,
    averaged_squares,
    batches,
    finite,
    host_step,
    inverse_roots_of,
    moment,
    rows_of,
    square_states,
    wide_zeros_like,
)

GRAFTING = ("adam", "sgd", None)
TINY = 1e-16  # the authors'


class Shampoo(RuleOptimizer):
    r"""Shampoo: momentum between the inverse roots of two preconditioners, one of the rows and one of the columns,
    with steps as long as those of another optimizer.

    For a matrix :math:`g_t` with k preconditioners:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad \hat m_t = m_t / (1 - \beta_1^t) \\
        L_t &= \beta_2 L_{t-1} + (1 - \beta_2) g_t g_t^\top, \qquad
        R_t = \beta_2 R_{t-1} + (1 - \beta_2) g_t^\top g_t \\
        u_t &= \left( \tfrac{L}{1 - \beta_2^s} + \epsilon I \right)^{-1/2k} \hat m_t
            \left( \tfrac{R}{1 - \beta_2^s} + \epsilon I \right)^{-1/2k} \\
        p_t &= (1 - \gamma\lambda) p_{t-1} - \gamma \frac{\lVert a_t \rVert}{\lVert u_t \rVert} u_t

    The roots are of the last step s that was a multiple of ``precondition_frequency``, or of
    ``start_preconditioning_step``, before which :math:`a_t` itself is the update. That is Adam's without a decay
    (``grafting="adam"``), with ``grafting_eps``, or :math:`\hat m_t` (``"sgd"``); with None :math:`u_t` is not made as
    long as another, and :math:`\hat m_t` is the update until the start. With :math:`\beta_2 = 1` all averages of
    squares are sums, not divided by anything: then Adam is Adagrad, and without grafting, with a start and a frequency
    of 1 and :math:`\beta_1 = 0`, this is the Shampoo of the first paper.

    A parameter of more than two dimensions is the matrix of its first dimension by all others. With ``block_size``
    matrices are cut into blocks, as few as there can be with rows and columns of at most so many, all of one shape:
    each has preconditioners of its own, and a step as long as the other optimizer's is there. A side that is longer
    than ``max_precond_dim``, or 1, has no preconditioner. Vectors and numbers have none: :math:`a_t` is their update;
    with ``precondition_1d`` vectors have L.

    Matrices of one shape are updated together, in float32 (float64 parameters: float64), whatever the dtype of the
    parameter. On CUDA the host waits in steps in which roots are computed, which take many times as long; in others
    only with ``capturable``, or where betas are tensors on the device: which steps these are is chosen on the host. For
    the same reason a step can't be captured into a CUDA graph.

    State of a parameter: ``step`` (0-dim float32); ``exp_avg`` :math:`m`, and with ``grafting="adam"`` ``exp_avg_sq``,
    of its shape; of each side that has a preconditioner ``L`` and its root ``root_L``, ``R`` and ``root_R``, of a
    matrix in blocks ``(blocks, n, n)``, row by row of blocks. All are float32 or wider.

    Args:
        params: parameters, named parameters or groups; real ones.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`\beta_1` in [0, 1) and :math:`\beta_2` in [0, 1].
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        precondition_frequency: after so many steps there are new roots; an int of 1 or more.
        start_preconditioning_step: the step from which on there are roots; None for ``precondition_frequency``.
        max_precond_dim: the longest side that has a preconditioner; an int of 0 or more.
        precondition_1d: whether vectors have one.
        block_size: rows and columns that a block of a matrix may have; an int of 2 or more, None for whole matrices.
        grafting: ``"adam"``, ``"sgd"`` or None.
        grafting_eps: Adam's :math:`\epsilon \ge 0`.
        options: see :class:`Options`. ``state_dtype`` is refused: its states are the prologue's.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: a parameter is complex, or the step is captured into a CUDA graph (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = triton_optim.Shampoo([p], lr=0.1, precondition_frequency=1, backend="eager")
        >>> p.grad = torch.diag(torch.tensor([3.0, 4.0]))
        >>> optimizer.step()
        >>> p.data.round(decimals=4)
        tensor([[-0.1000,  0.0000],
                [ 0.0000, -0.1000]])

    For: Networks whose matrices are small enough for two preconditioners each, with settings that fit Adam: the winner
    of AlgoPerf.

    Source: Gupta et al. 2018, Algorithm 1, https://arxiv.org/abs/1802.09568; averages, bias corrections, start and
    grafting: Shi et al. 2023, section 3, https://arxiv.org/abs/2309.06497. The defaults are those that its authors
    recommend in place of Adam, where a side of more than 8192 has no preconditioner: they cut it into blocks of 8192
    and a rest, ``block_size`` into blocks of one shape. They also make one dimension of neighbours whose product is at
    most that.
    """

    rule = muon
    kept_states = (
        moment("exp_avg"),
        State("exp_avg_sq", lambda p, group: wide_zeros_like(p) if group["grafting"] == "adam" else None, True),
        *square_states("{}"),
        *square_states("root_{}", unit=True),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 1e-5,
        precondition_frequency: int = 100,
        start_preconditioning_step: int | None = None,
        max_precond_dim: int = 8192,
        precondition_1d: bool = False,
        grafting: str | None = "adam",
        grafting_eps: float = 1e-8,
        block_size: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "start_preconditioning_step": start_preconditioning_step,
            "max_precond_dim": max_precond_dim,
            "precondition_1d": precondition_1d,
            "grafting": grafting,
            "grafting_eps": grafting_eps,
            "block_size": block_size,
        }
        super().__init__(params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_ranges(group, "lr", "eps", "weight_decay", "grafting_eps")
        check_range("beta parameter at index 0", group["betas"][0], 0.0, 1.0)
        beta2 = group["betas"][1]
        if not 0 <= beta2 <= 1:
            raise ValueError(
                f"Invalid beta parameter at index 1: {beta2}. It must be at least 0 and at most 1, which makes sums of "
                "the averages."
            )
        check_count("precondition_frequency", group["precondition_frequency"], 1)
        if group["start_preconditioning_step"] is not None:
            check_count("start_preconditioning_step", group["start_preconditioning_step"], 1)
        check_count("max_precond_dim", group["max_precond_dim"], 0)
        if group["block_size"] is not None:
            check_count("block_size", group["block_size"], 2)
        if group["grafting"] not in GRAFTING:
            raise ValueError(f'Invalid grafting: {group["grafting"]!r}. Use "adam", "sgd" or None.')

    def scalars(self, group: dict[str, Any], step: Any) -> BasisScalars:
        return BasisScalars(lr=group["lr"], keep=1 - group["lr"] * group["weight_decay"], step=step)

    def prologue(
        self, group: dict[str, Any], h: Any, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]
    ) -> list[Tensor]:
        step, made = host_step(self, h, params), list(gradients)
        if group["grafting"] == "adam":  # which a group may come to say later
            for p, state in zip(params, states, strict=True):
                if "exp_avg_sq" not in state:
                    state["exp_avg_sq"] = wide_zeros_like(p)
        for own, batch in batches(params, gradients, states, group["block_size"]):
            for i, u in zip(own, batch.whole(update_of(batch, group, step)).unbind(), strict=True):
                made[i] = placed_as(params[i], u.reshape(params[i].shape))
        return made


def update_of(batch: Batch, group: dict[str, Any], step: int) -> Tensor:
    """What is subtracted of a batch; its states are updated."""
    beta1, beta2 = map(float, group["betas"])
    new, correction = (1.0, 1.0) if beta2 == 1 else (1 - beta2, 1 - beta2**step)
    x, frequency = batch.gradients, group["precondition_frequency"]
    moments = torch.lerp(batch.moments("exp_avg"), x, 1 - beta1)
    batch.keep_moments("exp_avg", moments)
    update = other = moments / (1 - beta1**step)
    if group["grafting"] == "adam":
        squares = torch.addcmul(beta2 * batch.moments("exp_avg_sq"), x, x, value=new)
        batch.keep_moments("exp_avg_sq", squares)
        other = update / ((squares / correction).sqrt() + group["grafting_eps"])
    start = group["start_preconditioning_step"]
    start = frequency if start is None else start
    for side in batch.sides:
        batch.keep(side, averaged_squares(batch.kept(side), rows_of(x, side), beta2, new))
    if step == start or (step > start and step % frequency == 0):
        means = {side: batch.kept(side) / correction for side in batch.sides}
        rooted = partial(inverse_roots_of, root=2 * len(batch.sides), eps=group["eps"])
        for side, root in batch.decomposed(means, rooted).items():
            name = f"root_{side}"
            batch.keep(name, torch.where(finite(means[side]), root, batch.kept(name)))
    if step < start or not batch.sides:
        return other
    for side in batch.sides:
        root = batch.kept(f"root_{side}")
        update = root @ update if side == "L" else update @ root
    if group["grafting"] is None:
        return update
    return update * (norms(other) / (norms(update) + TINY))


def norms(x: Tensor) -> Tensor:
    """Of each matrix of a batch, ``(B, 1, 1)``."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return lengths
