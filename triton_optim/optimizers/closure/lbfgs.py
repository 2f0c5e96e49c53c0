"""L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.checks import check_range
from .closure_driven import ClosureOptimizer, copied, largest
from .lbfgs_history import History
from .line_search import Trial


class LBFGS(ClosureOptimizer):
    r"""L-BFGS: a quasi-Newton direction from the last steps and changes of the gradient; torch.optim.LBFGS's twin.

    .. math::
        d_k &= -H_k g_k, \qquad s_k = x_{k+1} - x_k, \qquad y_k = g_{k+1} - g_k \\
        H_k &= \gamma_k I + \begin{pmatrix} S & \gamma_k Y \end{pmatrix}
            \begin{pmatrix} R^{-T} (D + \gamma_k Y^T Y) R^{-1} & -R^{-T} \\ -R^{-1} & 0 \end{pmatrix}
            \begin{pmatrix} S^T \\ \gamma_k Y^T \end{pmatrix}

    with the last pairs as columns of :math:`S` and :math:`Y`, :math:`R` the upper triangle of :math:`S^T Y`,
    :math:`D` its diagonal and :math:`\gamma = s^T y / y^T y` of the newest pair: what the two-loop recursion
    computes, but in three products of a matrix and a vector whatever the length of the history.

    Arguments, state and results are torch's, and state dicts load both ways in mid-training. It departs from torch
    where a loss or gradient is NaN or Inf (a step that starts there returns the loss and changes no parameter, the
    line search goes back to what is finite, and without one the step ends there), and where a trial's loss is lower
    but by less than the Wolfe condition asks: torch narrows towards that trial and can leave the minimum outside.

    State, all of it the first parameter's: ``d``, ``t``, ``old_dirs`` (the y), ``old_stps`` (the s), ``ro``,
    ``H_diag``, ``prev_flat_grad``, ``prev_loss``, ``func_evals``, ``n_iter``. The history is
    2 (history_size + 1) vectors like all parameters together, float32 of 16-bit ones. A step without any parameter
    returns the loss.

    Args:
        params: parameters or named parameters of one device, or one group of them.
        lr: step length, at least 0; with a line search, the first one tried. A number or a 1-element tensor.
        max_iter: iterations a step, at least 1.
        max_eval: evaluations a step after which no iteration begins; by default 5/4 of max_iter.
        tolerance_grad: ends the step when no entry of the gradient is larger, at least 0.
        tolerance_change: ends the step when no entry of the update, or the change of the loss, is larger, at least 0.
        history_size: pairs kept, at least 1.
        line_search_fn: ``"strong_wolfe"`` or None, which takes steps of lr.
        maximize: ascend instead of descend. Of torch's releases only those from 2.14 on know it: an older one, given
            the state dict, descends.

    Raises:
        ValueError: lr is out of range, or there is a second group.
        TypeError: step is called without a closure.
        RuntimeError: in step: another line_search_fn; the closure returns no loss; or every trial of a line search
            is NaN or Inf, the parameters then being those of its start.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> optimizer = triton_optim.LBFGS([p], max_iter=100, line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> first_loss = optimizer.step(closure)
        >>> p.data
        tensor([1.0000, 1.0000], dtype=torch.float64)

    For: Small smooth problems with full batches, such as fits and physics-informed networks.

    Source: Byrd, Nocedal & Schnabel 1994, Theorem 2.2, https://doi.org/10.1007/BF01582063; Nocedal & Wright,
    Numerical Optimization, 2nd ed., section 7.2.
    """

    _history: History | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        maximize: bool = False,
    ) -> None:
        check_range("max_iter value", max_iter, 0)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def state_dict(self) -> dict[str, Any]:
        """Return torch.optim.LBFGS's state dict, as a copy: torch's and our next steps reuse the tensors."""
        packed = super().state_dict()
        packed["state"] = copied(packed["state"])
        return packed

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
        line_search = group["line_search_fn"]
        if line_search not in (None, "strong_wolfe"):
            raise RuntimeError(
                f"only 'strong_wolfe' is supported as line_search_fn, got {line_search!r}. Use it or None."
            )
        evaluate, first, loss, g, state = self.start(closure)
        evaluations = 1
        if not math.isfinite(loss) or not group["tolerance_grad"] < largest(g) < math.inf:
            return first

        lr, change = float(group["lr"]), group["tolerance_change"]
        for iteration in range(1, group["max_iter"] + 1):
            state["n_iter"] += 1
            d = self._direction(state, g)
            t = 1.0 / max(1.0, float(g.abs().sum())) * lr if state["n_iter"] == 1 else lr
            slope = float(g.dot(d))
            # Until the step is taken, it is one of length 0: a closure that raises leaves a state to go on from.
            state |= {"d": d, "t": 0.0, "prev_flat_grad": g, "prev_loss": loss}
            if not -math.inf < slope < 0 or slope > -change:
                state["t"] = t
                break
            previous = loss
            if line_search:
                found, used = self.search(
                    evaluate,
                    Trial(0.0, loss, g, slope),
                    d,
                    t,
                    max_trials=group["max_eval"] - evaluations,
                    min_width=change / largest(d),
                )
                t, loss, g = found.t, found.loss, found.gradient
            else:
                self.scatter_parameters(self.gather_parameters().add_(d, alpha=t))
                used = 0
            state["t"] = t
            if not line_search and iteration < group["max_iter"]:
                loss, g, used = evaluate()[1], self.gather_gradient(), 1
            evaluations += used
            state["func_evals"] += used
            if iteration == group["max_iter"] or evaluations >= group["max_eval"]:
                break
            if not math.isfinite(loss) or not group["tolerance_grad"] < largest(g) < math.inf:
                break
            if abs(t) * largest(d) <= change or abs(loss - previous) < change:
                break
        return first

    def _direction(self, state: dict[str, Any], g: Tensor) -> Tensor:
        """Take the last step into the history, and give the direction from it."""
        size = self.param_groups[0]["history_size"]
        steps, changes = state.get("old_stps") or [], state.get("old_dirs") or []
        history = self._history
        if state["n_iter"] == 1:
            history = History(size, g)
            state |= {"H_diag": 1.0, "ro": []}
            d = g.neg()
        else:
            if history is None or not history.holds(steps, changes, size):
                history = History(size, g)
                history.refill(steps, changes)
            scale, with_g = history.update(state["d"] * state["t"], g - state["prev_flat_grad"], g)
            if scale > 0:
                state["H_diag"] = scale
                state["ro"] = [1 / ys for ys in history.sy.diagonal()[history.order].tolist()]
            d = history.direction(g, with_g, float(state["H_diag"]))
        self._history = history
        state["old_stps"], state["old_dirs"] = history.lists()
        return d
