"""Rules around rules: see triton_optim/wrappers. With 0 for the parameter, a base returns what its step adds to it."""

from ..language import jit, where


@jit
def opposite(x, y):
    """Whether one is above 0 and the other below."""
    return ((x < 0) & (y > 0)) | ((x > 0) & (y < 0))


@jit
def cautious(base, p, g, states, h, own, w):
    """Only what goes down the gradient moves: Liang et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.16085."""
    step, *states = base(0.0, g, *states, h)
    return p * w.keep + where(opposite(step, g), step * w.scale, 0.0), *states


@jit
def agreements(base, p, g, states, h, own, w):
    """How many elements those are."""
    step, *states = base(0.0, g, *states, h)
    return (where(opposite(step, g), 1.0, 0.0),)


@jit
def cautious_decay(base, p, g, states, h, own, w):
    """Only what the step does not take farther from 0 decays: Chen et al. 2025, https://arxiv.org/abs/2510.12402."""
    step, *states = base(0.0, g, *states, h)
    return where(opposite(-step, p), p, p * w.keep) + step, *states


@jit
def decoupled_decay(base, p, g, states, h, own, w):
    """Decay beside the step: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101."""
    step, *states = base(0.0, g, *states, h)
    return p * w.keep + step, *states


@jit
def clipped(base, p, g, states, h, own, w):
    """A step that is no longer than its root mean square may be: Shazeer & Stern 2018, section 6,
    https://arxiv.org/abs/1804.04235.
    """
    step, *states = base(0.0, g, *states, h)
    return p * w.keep + step * w.scale, *states


@jit
def squares(base, p, g, states, h, own, w):
    """Of the steps."""
    step, *states = base(0.0, g, *states, h)
    return (step * step,)


@jit
def lookahead(base, p, g, states, h, own, w):
    """Slow weights that follow the fast ones now and then: Zhang et al. 2019, Algorithm 1,
    https://arxiv.org/abs/1907.08610.
    """
    fast, *states = base(p, g, *states, h)
    (slow,) = own
    slow = where(w.follows != 0, slow + w.alpha * (fast - slow), slow)
    return where(w.follows != 0, slow, fast), *states, slow


@jit
def nesterov(base, p, g, states, h, own, w):
    """A momentum of the steps, and gradients where it will have led: Sutskever et al. 2013, section 2,
    https://proceedings.mlr.press/v28/sutskever13.html; the parameter is the point ahead.
    """
    step, *states = base(0.0, g, *states, h)
    (velocity,) = own
    velocity = w.momentum * velocity + step
    return p * w.keep + (w.momentum * velocity + step), *states, velocity
