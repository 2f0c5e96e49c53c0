"""KL-SOAP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ...core.checks import check_positive
from ...core.optimizer import RuleOptimizer
from ...options import Options
from .eigenbases import Batch, averaged_squares, rows_of, vector_states
from .soap import SOAP, shampoo_beta_of

OTHER = {"L": "R", "R": "L"}
LEAST, MOST = 10, 4000  # of the bound of 1 / sqrt of an eigenvalue: the authors'


class KLSOAP(SOAP):
    r"""KL-SOAP: SOAP whose preconditioners are the closest Kronecker product to the gradients' covariance, in the
    Kullback-Leibler divergence: each is formed of gradients that the other has whitened.

    As :class:`SOAP`, but for an :math:`a \times b` matrix, with :math:`S_L = Q_L \operatorname{diag}(\lambda_L)
    Q_L^\top`, so :math:`S_R`, and the mean over a row:

    .. math::
        L_t &= \beta_s L_{t-1} + (1 - \beta_s) \tfrac{1}{b} g_t S_R^{-1} g_t^\top, \qquad
        R_t = \beta_s R_{t-1} + (1 - \beta_s) \tfrac{1}{a} g_t^\top S_L^{-1} g_t \\
        \lambda_L &\leftarrow \beta_s \lambda_L + (1 - \beta_s)
            \operatorname{mean} \left( (\tilde g_t \operatorname{diag}(\lambda_R)^{-1/2})^2 \right), \qquad
        \lambda_R \text{ alike of columns}

    The first step takes S for the identity, and :math:`\lambda` starts as ``init_factor``. No :math:`\lambda^{-1/2}`
    exceeds max(10, min(n, 4000)) where there are n. Eigenvectors are not sorted, and by default nothing is divided by
    bias corrections. A side without a preconditioner whitens nothing.

    State of a parameter: SOAP's, and of each side that has a preconditioner ``eigenvalues_L`` or ``eigenvalues_R``.

    Args:
        params: parameters, named parameters or groups; real ones.
        lr: :math:`\gamma \ge 0`; a number or a 1-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        shampoo_beta: :math:`\beta_s` in [0, 1); None for :math:`\beta_2`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0` of SOAP.
        precondition_frequency: after so many updates there are new bases; an int of 1 or more.
        max_precond_dim: the longest side that has a preconditioner; an int of 0 or more.
        precondition_1d: whether vectors have one.
        normalize_grads: divide each parameter's update by its root mean square.
        correct_bias: divide by the bias corrections of Adam.
        init_factor: what each eigenvalue starts as, above 0.
        options: see :class:`Options`. ``state_dtype`` is refused: its states are the prologue's.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: a parameter is complex, or the step is captured into a CUDA graph (in :meth:`step`).

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = triton_optim.KLSOAP(model.parameters(), backend="eager")
        >>> model(torch.ones(1, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["eigenvalues_L"]
        tensor([0.1000, 0.1000, 0.1000])

    For: SOAP's place, where its preconditioners are to fit the gradients better, at SOAP's cost.

    Source: Lin et al. 2025, https://arxiv.org/abs/2509.03378; what the eigenvalues start as and their bound as in the
    authors' code, which computes in bfloat16.
    """

    kept_states = (*SOAP.kept_states, *vector_states("eigenvalues_{}", "init_factor"))
    ordered = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = False,
        init_factor: float = 0.1,
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
            "init_factor": init_factor,
        }
        RuleOptimizer.__init__(self, params, defaults, **options)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        super().check_hyperparameters(group)
        check_positive("init_factor", group["init_factor"])

    def begin(self, batch: Batch, group: dict[str, Any]) -> None:
        super().accumulate(batch, group)
        for side in batch.sides:
            batch.keep(side, batch.kept(side) / rows_of(batch.gradients, side).shape[-1])
        batch.begin()

    def accumulate(self, batch: Batch, group: dict[str, Any]) -> None:
        beta = shampoo_beta_of(group)
        held = {side: batch.kept(f"eigenvalues_{side}") for side in batch.sides}
        roots = {side: values.rsqrt().unsqueeze(-2) for side, values in held.items()}
        for side, values in held.items():
            other, x, rotated = OTHER[side], rows_of(batch.gradients, side), rows_of(batch.rotated, side)
            if other in roots:
                x, rotated = x @ batch.bases[other] * roots[other], rotated * roots[other]
            batch.keep(side, averaged_squares(batch.kept(side), x, beta, (1 - beta) / x.shape[-1]))
            means = beta * values + (1 - beta) * rotated.square().mean(-1)
            bound = max(LEAST, min(values.shape[-1], MOST))
            batch.keep(f"eigenvalues_{side}", means.clamp(min=bound**-2))
