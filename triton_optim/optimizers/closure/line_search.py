"""Strong Wolfe line search: one variable, the step length; what the function is of does not matter here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# A first step 1e20 times too long is still brought back; what is not finite below that is not finite at all.
MAX_NONFINITE = 20


class Trial(NamedTuple):
    """The function at one step length."""

    t: float
    loss: float
    gradient: Tensor
    slope: float


def strong_wolfe(
    evaluate: Callable[[float], tuple[float, Tensor, float]],
    start: Trial,
    t: float,
    *,
    c1: float = 1e-4,
    c2: float = 0.9,
    max_trials: int = 25,
    min_width: float = 0.0,
    noise: float = 0.0,
) -> tuple[Trial, int]:
    r"""Find a step length that satisfies the strong Wolfe conditions.

    .. math::
        \phi(t) \le \phi(0) + c_1 t \phi'(0), \qquad |\phi'(t)| \le c_2 |\phi'(0)|

    Steps are lengthened until an interval holds such a point; the interval is then narrowed. New trials minimise
    the cubic through both ends; an interior trial that twice in a row lies within a tenth of the interval of an end
    is moved away from it. A loss or slope of NaN or Inf counts as a loss of Inf, a step too long: the next is a tenth
    of it, or halfway to the best step known.

    Args:
        evaluate: gives loss, flat gradient and slope :math:`\phi'` at a step length.
        start: the function at 0, finite, its slope negative.
        t: first step length, at least 0.
        c1: sufficient decrease, in (0, 1).
        c2: curvature, in (c1, 1): 0.9 for quasi-Newton directions, 0.1 or less for conjugate ones.
        max_trials: trials after the first; those before the first finite one are not counted.
        min_width: an interval narrower than this is narrowed no more, at least 0.
        noise: losses that differ from the start's by no more than this, and that should by their slopes, are taken
            from the slopes, as of a parabola; at least 0. `Trial.loss` is then that estimate.

    Returns:
        The accepted trial, and how many evaluations it took. When no trial satisfies both conditions, the lowest
        one: `start` itself where none is lower.

    Raises:
        RuntimeError: no trial was finite.

    Example:
        >>> import torch
        >>> def evaluate(t):
        ...     return (t - 2) ** 2, torch.tensor([2 * (t - 2)]), 2 * (t - 2)
        >>> found, evaluations = strong_wolfe(evaluate, Trial(0.0, *evaluate(0.0)), 0.1, c2=0.1)
        >>> round(found.t, 6), evaluations
        (2.0, 3)

    Source: Nocedal & Wright, Numerical Optimization, 2nd ed., Algorithms 3.5 and 3.6, equation 3.59.
    """
    evaluations = 0
    any_finite = False

    def trial(t: float) -> Trial:
        nonlocal evaluations, any_finite
        evaluations += 1
        loss, gradient, slope = evaluate(t)
        if math.isfinite(loss) and math.isfinite(slope):
            any_finite = True
            by_slopes = 0.5 * (start.slope + slope) * t
            if max(abs(loss - start.loss), abs(by_slopes)) <= noise:
                loss = start.loss + by_slopes
            return Trial(t, loss, gradient, slope)
        return Trial(t, math.inf, gradient, math.inf)

    def decreases(point: Trial) -> bool:
        return point.loss <= start.loss + c1 * point.t * start.slope

    def is_flat(point: Trial) -> bool:
        return abs(point.slope) <= -c2 * start.slope

    if t == 0:
        return start, 0
    previous, current = start, trial(t)
    trials = 0
    # `trials > 1` is torch's; the book compares from the second trial on.
    while decreases(current) and not (trials > 1 and current.loss >= previous.loss):
        if trials < max_trials and is_flat(current):
            return current, evaluations
        if trials >= max_trials or current.slope >= 0:
            break
        longer = cubic_minimum(previous, current, current.t + 0.01 * (current.t - previous.t), 10 * current.t)
        previous, current = current, trial(longer)
        trials += 1

    # The book's order, in which low has always decreased enough; torch takes the lower, and can lose the minimum.
    low, high = (current, previous) if decreases(current) and current.loss < previous.loss else (previous, current)
    nudged = False
    while trials < max_trials if any_finite else evaluations < MAX_NONFINITE:
        left, right = min(low.t, high.t), max(low.t, high.t)
        width = right - left
        if width == 0 or width < min_width:
            break
        if math.isfinite(high.loss):
            t = cubic_minimum(low, high, left, right)
            margin = 0.1 * width
            near_an_end = min(right - t, t - left) < margin
            if near_an_end and (nudged or t >= right or t <= left):
                t = right - margin if right - t < t - left else left + margin
                nudged = False
            else:
                nudged = near_an_end
        else:
            t = low.t + (0.1 if low is start else 0.5) * (high.t - low.t)
        current = trial(t)
        trials += any_finite
        if not decreases(current) or current.loss >= low.loss:
            high = current
        else:
            if is_flat(current):
                return current, evaluations
            low, high = current, low if current.slope * (high.t - low.t) >= 0 else high

    if not any_finite:
        raise RuntimeError(
            f"The loss or its gradient is NaN or Inf at all {evaluations} steps tried along the direction, the "
            f"shortest of length {current.t:.3g}, though what is minimized is {start.loss:.6g} at the start; the "
            "parameters were put back there. Check the closure near the starting point (a log or square root at its "
            "edge, an overflow of the dtype, a loss that falls without bound) or lower lr."
        )
    return min(low, high, key=lambda point: point.loss), evaluations


def cubic_minimum(a: Trial, b: Trial, low: float, high: float) -> float:
    """Minimise the cubic that has the losses and slopes of two trials, between two bounds.

    Returns:
        The middle of the bounds where the cubic has no minimum.
    """
    if a.t > b.t:
        a, b = b, a
    width = b.t - a.t
    d1 = a.slope + b.slope - 3 * (b.loss - a.loss) / width
    # A power of 2, which rounds nothing: squares of tiny or huge slopes would vanish or overflow.
    _, exponent = math.frexp(max(abs(a.slope), abs(b.slope), abs(d1)))
    s1, sa, sb = (math.ldexp(slope, -exponent) for slope in (d1, a.slope, b.slope))
    square = s1 * s1 - sa * sb
    if square >= 0:
        d2 = math.ldexp(math.sqrt(square), exponent)
        divisor = b.slope - a.slope + 2 * d2
        t = b.t - width * ((b.slope + d2 - d1) / divisor) if divisor != 0 else math.nan
        if math.isfinite(t):
            return min(max(t, low), high)
    return (low + high) / 2
