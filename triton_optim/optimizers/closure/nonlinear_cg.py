"""Nonlinear conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.checks import check_range
from .closure_driven import ClosureOptimizer, largest
from .line_search import Trial

# Powell's: gradients this far from orthogonal say that the directions are conjugate no more.
ORTHOGONAL = 0.2
# With the book's 0.1 directions are conjugate too loosely: 20-dimensional quadratics of condition 1e2 to 1e4 took up to
# 12 times the evaluations of L-BFGS, with 0.01 up to 3 times (Polak-Ribiere: 7 and 2 times).
CURVATURE = 0.01
# The first trial of all moves by this share of the largest parameter, or is to gain this share of the loss.
FIRST = 0.1
MAX_TRIALS = 25
# Rounding of a loss, in units of its dtype's precision: without it float32 does not solve quadratics of condition 1e4.
NOISE = 10


class NonlinearCG(ClosureOptimizer):
    r"""Nonlinear conjugate gradients: two vectors of state, and a line search at each iteration.

    .. math::
        d_k = -g_k + \beta_k d_{k-1}, \qquad p_{k+1} = p_k + t_k d_k, \qquad y_k = g_k - g_{k-1}

    .. math::
        \beta_k^{PR+} = \max\Bigl(0, \frac{g_k^T y_k}{g_{k-1}^T g_{k-1}}\Bigr), \qquad
        \beta_k^{FR} = \frac{g_k^T g_k}{g_{k-1}^T g_{k-1}}, \qquad
        \beta_k^{HS} = \frac{g_k^T y_k}{d_{k-1}^T y_k}

    :math:`t_k` satisfies the strong Wolfe conditions with :math:`c_2 = 0.01`; the first one tried is
    :math:`2 (f_k - f_{k-1}) / g_k^T d_k`, and in the first iteration
    :math:`0.1 \|p_0\|_\infty / \|g_0\|_\infty`, for p of zeros :math:`0.1 |f_0| / g_0^T g_0`, where that is 0 too
    :math:`1 / \|g_0\|_\infty`. Where losses differ by no more than their rounding, the slopes say which is lower.
    The iterations are those of the same problem in other units, :math:`s f(p / c)`, unless p and f are 0 at the start:
    tolerances are relative. :math:`\beta = 0`, a restart, every `restart` iterations, where d would
    not be one of descent, after a line search that found nothing lower, and by Powell's test
    :math:`|g_k^T g_{k-1}| \ge 0.2\, g_k^T g_k`.

    State, all of it the first parameter's: ``d``, a direction divided by the largest entry of the gradient, ``t``,
    ``prev_flat_grad``, ``prev_loss``, ``since_restart``, ``func_evals``, ``n_iter``.

    Args:
        params: parameters or named parameters of one device, or one group of them.
        lr: factor of the first step tried in the first iteration, at least 0; later ones follow from the losses. A
            number or a 1-element tensor.
        max_iter: iterations a step, at least 1.
        max_eval: evaluations a step after which no iteration begins; by default 5/2 of max_iter.
        tolerance_grad: ends the step when no entry of the gradient is larger than this share of the largest one at the
            step's start, at least 0.
        tolerance_change: ends the step when no entry of the update is larger than this share of the largest parameter,
            or the change of the loss than this share of the loss, at least 0.
        beta: ``"polak-ribiere+"``, ``"fletcher-reeves"`` or ``"hestenes-stiefel"``.
        restart: iterations from one restart to the next, at least 1; None leaves it to the other tests. The textbook's
            number of parameters is far too few where that is small: 6 times the evaluations on a 20-dimensional
            quadratic of condition 1e4.
        maximize: ascend instead of descend.

    Raises:
        ValueError: lr, beta or restart is out of range, or there is a second group.
        TypeError: step is called without a closure.
        RuntimeError: in step: the closure returns no loss; or every trial of a line search is NaN or Inf, the
            parameters then being those of its start. If the first loss or gradient is NaN or Inf, step returns that
            loss and changes no parameter.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> optimizer = triton_optim.NonlinearCG([p], max_iter=100)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> first_loss = optimizer.step(closure)
        >>> p.data
        tensor([1.0000, 1.0000], dtype=torch.float64)

    For: LBFGS's place, where its history does not fit into memory.

    Source: Nocedal & Wright, Numerical Optimization, 2nd ed., section 5.2, equations 5.44 to 5.46, 5.52 and 3.60;
    Powell 1977, https://doi.org/10.1007/BF01593790. The first trial, and slopes in place of losses: Hager & Zhang 2006,
    https://doi.org/10.1145/1132973.1132979.
    """

    betas = ("polak-ribiere+", "fletcher-reeves", "hestenes-stiefel")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-8,
        tolerance_change: float = 1e-12,
        beta: str = "polak-ribiere+",
        restart: int | None = None,
        *,
        maximize: bool = False,
    ) -> None:
        check_range("max_iter value", max_iter, 0)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 2 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "beta": beta,
            "restart": restart,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check_hyperparameters(self, group: dict[str, Any]) -> None:
        super().check_hyperparameters(group)
        beta, restart = group["beta"], group["restart"]
        if beta not in self.betas:
            raise ValueError(f"Invalid beta: {beta!r}. It must be one of {', '.join(self.betas)}.")
        if restart is not None and not restart >= 1:
            raise ValueError(f"Invalid restart: {restart}. It must be at least 1, or None for none by count.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run up to max_iter iterations.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned first, before any update.
        """
        group = self.param_groups[0]
        self.check_hyperparameters(group)
        evaluate, first, loss, g, state = self.start(closure)
        evaluations = 1
        size = largest(g)
        smallest = group["tolerance_grad"] * size
        if not math.isfinite(loss) or not smallest < size < math.inf:
            return first

        eps, change = torch.finfo(g.dtype).eps, group["tolerance_change"]
        for _ in range(group["max_iter"]):
            state["n_iter"] += 1
            d, slope = self._direction(state, g)
            # Of what moves: a mask of -inf, which has no gradient, says nothing of the units.
            length, reach = largest(self.gather_parameters().where(d != 0, 0.0)), largest(d)
            t = 2 * (loss - state["prev_loss"]) / slope if "prev_loss" in state and slope else 0.0
            if not 0 < t < math.inf:
                t = float(group["lr"]) * (FIRST * length or FIRST * abs(loss / slope) or 1.0)
            # Until the step is taken, it is one of length 0: a closure that raises leaves a state to go on from.
            state |= {"d": d, "t": 0.0, "prev_flat_grad": g, "prev_loss": loss}
            if not -math.inf < slope < 0:
                break
            previous = loss
            found, used = self.search(
                evaluate,
                Trial(0.0, loss, g, slope),
                d,
                t,
                c2=CURVATURE,
                max_trials=min(MAX_TRIALS, group["max_eval"] - evaluations),
                min_width=10 * eps * length / reach,
                noise=NOISE * eps * abs(loss),
            )
            state["t"], loss, g = found.t, found.loss, found.gradient
            evaluations += used
            state["func_evals"] += used
            if evaluations >= group["max_eval"] or not smallest < largest(g):
                break
            if found.t * reach <= change * length or abs(loss - previous) <= change * abs(previous):
                break
        return first

    def _direction(self, state: dict[str, Any], g: Tensor) -> tuple[Tensor, float]:
        """Compute the next direction, divided by the largest entry of the gradient, and its slope.

        Products of gradients so divided neither overflow nor vanish, in whatever units the problem is.
        """
        group = self.param_groups[0]
        since = state.get("since_restart", 0)
        restart = group["restart"] or math.inf
        state["since_restart"] = 1
        size = largest(g)
        unit = g / size
        if not since or since >= restart or not state["t"]:
            return unit.neg(), -size * float(unit.dot(unit))
        d, before = state["d"], state["prev_flat_grad"]
        size_before = largest(before)
        unit_before = before / size_before
        products = [
            unit.dot(unit),
            unit.dot(unit_before),
            unit_before.dot(unit_before),
            unit.dot(d),
            unit_before.dot(d),
        ]
        gg, gb, bb, gd, bd = torch.stack(products).tolist()
        # Of y and beta in the units of the last gradient: d is kept in those.
        ratio = size / size_before
        gy, dy = ratio * gg - gb, ratio * gd - bd
        if group["beta"] == "fletcher-reeves":
            beta = ratio * gg / bb
        elif group["beta"] == "hestenes-stiefel":
            beta = gy / dy if dy else 0.0
        else:
            beta = max(0.0, gy / bb)
        slope = size * (beta * gd - gg)
        if slope >= 0 or abs(gb) >= ORTHOGONAL * gg * ratio:
            return unit.neg(), -size * gg
        state["since_restart"] = since + 1
        return torch.sub(d * beta, unit), slope
