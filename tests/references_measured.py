"""References of optimizers that measure a parameter as a whole, from the papers, as references.py says how; and steps
worked out by hand.
"""

import numpy as np
from references_runner import reference


def length(x):
    """The norm of a parameter, whatever its shape."""
    return np.sqrt(np.sum(np.square(x)))


def as_long_as(p, u):
    """|p| / |u|, and 1 where either is 0."""
    return length(p) / length(u) if length(p) > 0 and length(u) > 0 else 1.0


@reference
def lamb(p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, trust_ratio=True):
    """You et al. 2020, Algorithm 2, with the bias correction that it has, and phi the identity."""
    b1, b2 = betas
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
    if weight_decay != 0:
        u = u + weight_decay * p
    return p - lr * (as_long_as(p, u) if trust_ratio else 1.0) * u


LAMB = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 0.5}
# (options, gradients, after) as table.ByHand. p = 1, m^ = 2, v^ = 4: u = 2 / (2 + 1) + 0.5 * 1, and |p| / |u| * u is 1:
# a parameter of one element moves by lr * |p|. Of [1, 1] with g = [2, 0] it is u = [2/3 + 1/2, 1/2], |p| / |u| =
# sqrt(2) / sqrt(49/36 + 9/36) = 6 / sqrt(29), p = 1 - 0.1 * 6 / sqrt(29) * u.
LAMB_BY_HAND = (
    (LAMB, [2.0], {"p": 0.9, "exp_avg": 1.0, "exp_avg_sq": 2.0}),
    (
        LAMB,
        [[2.0, 0.0]],
        {"p": [1 - 0.7 / 29**0.5, 1 - 0.3 / 29**0.5], "exp_avg": [1.0, 0.0], "exp_avg_sq": [2.0, 0.0]},
    ),
    # Then m = 1.5, v = 3, m^ = 2, v^ = 4 again: u = 2 / 3 + 0.5 * 0.9, and p goes from 0.9 by a tenth of it.
    (LAMB, [2.0, 2.0], {"p": 0.81, "exp_avg": 1.5, "exp_avg_sq": 3.0}),
    # Without the trust ratio it moves by lr * u = 0.1 * 7 / 6.
    (LAMB | {"trust_ratio": False}, [2.0], {"p": 1 - 0.7 / 6}),
)
