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


@reference
def lars(
    p, g, state, lr=1.0, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, trust_coefficient=1e-3,
    trust_ratio=True,
):  # fmt: skip
    """You et al. 2017, Algorithm 1, with lr where torch's SGD has it. Where a norm is 0 the local rate is 1."""
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    rate = 1.0
    if trust_ratio and length(p) > 0 and length(g) > 0:
        rate = trust_coefficient * length(p) / (length(g) + weight_decay * length(p))
    u = rate * (g + decay)
    if momentum != 0:
        b = momentum * state["momentum_buffer"] + (1 - dampening) * u if "momentum_buffer" in state else u
        state["momentum_buffer"] = b
        u = u + momentum * b if nesterov else b
    return p - lr * u


LARS = {"lr": 0.5, "momentum": 0.5, "weight_decay": 1.0, "trust_coefficient": 0.25}
# p = 1, g = 3: the rate is 0.25 * 1 / (3 + 1), u = 4 / 16 = 0.25, p = 1 - 0.5 * 0.25. Then
# g = 0: the rate is 1, u = 0.875, b = 0.125 + 0.875, p = 0.875 - 0.5 * 1. Of [1, 1] with g = [6, 8] and no decay the
# rate is 0.25 * sqrt(2) / 10.
LARS_BY_HAND = (
    (LARS, [3.0], {"p": 0.875, "momentum_buffer": 0.25}),
    (LARS, [3.0, 0.0], {"p": 0.375, "momentum_buffer": 1.0}),
    (LARS | {"nesterov": True}, [3.0], {"p": 1 - 0.5 * 0.375, "momentum_buffer": 0.25}),
    (LARS | {"momentum": 0.0, "trust_ratio": False}, [3.0], {"p": -1.0}),
    (
        LARS | {"weight_decay": 0.0},
        [[6.0, 8.0]],
        {"p": [1 - 0.075 * 2**0.5, 1 - 0.1 * 2**0.5], "momentum_buffer": [0.15 * 2**0.5, 0.2 * 2**0.5]},
    ),
)


@reference
def novograd(
    p, g, state, lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False
):  # fmt: skip
    """Ginsburg et al. 2019, Algorithm 1, whose v begins as the square of the first gradient that is not 0; m_0 = 0."""
    b1, b2 = betas
    state["step"] = state.get("step", 0) + 1
    squares = length(g) ** 2
    v = state["norm_sq"] = b2 * state["norm_sq"] + (1 - b2) * squares if state.get("norm_sq", 0) != 0 else squares
    new = g / (np.sqrt(v) + eps)
    if weight_decay != 0:
        new = new + weight_decay * p
    if grad_averaging:
        new = (1 - b1) * new
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + new
    return p - lr * m


NOVOGRAD = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0, "weight_decay": 0.5}
# |g| = 5, v = 25: m = g / (5 + 1) + 0.5. Then |g|^2 = 281, v = 0.75 * 25 + 0.25 * 281 = 89 = 9.43398^2. Of one element:
# g = 3, m = 3 / 4 + 0.5 = 1.25, p = 0.875; then g = 1, v = 0.75 * 9 + 0.25 = 7.
NOVOGRAD_BY_HAND = (
    (NOVOGRAD, [[3.0, 4.0]], {"p": [0.9, 1 - 7 / 60], "exp_avg": [1.0, 7 / 6], "norm_sq": 25.0}),
    (NOVOGRAD, [[3.0, 4.0], [5.0, 16.0]], {"norm_sq": 89.0}),
    (NOVOGRAD, [3.0, 1.0], {"exp_avg": 0.625 + 1 / (7**0.5 + 1) + 0.4375, "norm_sq": 7.0}),
    # Before the first gradient that is not 0: m = 0.5, p = 0.95; then m = 0.25 + 3 / 4 + 0.475 and v = 9.
    (NOVOGRAD, [0.0, 3.0], {"p": 0.8025, "exp_avg": 1.475, "norm_sq": 9.0}),
    (NOVOGRAD | {"grad_averaging": True}, [3.0], {"p": 0.9375, "exp_avg": 0.625, "norm_sq": 9.0}),
)


def corrected(g, before, beta, gamma):
    """Yuan et al. 2024, equations 2.4 and 2.5: the gradient with its variance reduced, no longer than 1."""
    c = g + gamma * beta / (1 - beta) * (g - before) if gamma != 0 and beta != 0 else g
    return c / length(c) if length(c) > 1 else c


@reference
def mars_adamw(
    p, g, state, lr=3e-3, betas=(0.95, 0.99), eps=1e-8, weight_decay=0.0, gamma=0.025, optimize_1d=False,
    betas_1d=(0.9, 0.95),
):  # fmt: skip
    """Yuan et al. 2024, Algorithm 2, with the last step's own gradient in place of the other one; as the authors' code,
    plain AdamW for vectors.
    """
    t = state["step"] = state.get("step", 0) + 1
    before, state["previous_grad"] = state.get("previous_grad", np.zeros_like(g)), g
    if optimize_1d or np.ndim(g) >= 2:
        b1, b2 = betas
        g = corrected(g, before, b1, gamma)
    else:
        b1, b2 = betas_1d
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay)


@reference
def mars_lion(p, g, state, lr=3e-3, beta=0.95, weight_decay=0.0, gamma=0.025):
    """Yuan et al. 2024, Algorithm 4, with the last step's own gradient. sign(NaN) is 0, as torch.sign's."""
    before, state["previous_grad"] = state.get("previous_grad", np.zeros_like(g)), g
    m = state["exp_avg"] = beta * state.get("exp_avg", 0) + (1 - beta) * corrected(g, before, beta, gamma)
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * (np.where(np.isnan(m), 0, np.sign(m)) + decay)


MARS = {"lr": 0.1, "betas": (0.5, 0.75), "eps": 1.0, "weight_decay": 0.5, "gamma": 0.5}
# gamma * 0.5 / 0.5 = 0.5. g = [[0.3, 0.4]]: c = 1.5 g is 0.75 long, m^ = c, v^ = c^2, p = 1 - 0.1 (0.45 / 1.45 + 0.5).
# Then g = [[6, 8]]: c = g + 0.5 * [[5.7, 7.6]] = [[8.85, 11.8]], of length 14.75: [[0.6, 0.8]].
# A vector takes AdamW: m^ = g = 0.3, of 0.3 / 1.3.
MARS_ADAMW_BY_HAND = (
    (
        MARS,
        [[[0.3, 0.4]]],
        {"p": [[0.95 - 0.045 / 1.45, 0.95 - 0.06 / 1.6]], "exp_avg": [[0.225, 0.3]], "previous_grad": [[0.3, 0.4]]},
    ),
    (
        MARS,
        [[[0.3, 0.4]], [[6.0, 8.0]]],
        {"exp_avg": [[0.4125, 0.55]], "exp_avg_sq": [[0.75 * 0.050625 + 0.09, 0.75 * 0.09 + 0.16]]},
    ),
    (MARS, [[0.3, 0.4]], {"p": [0.95 - 0.03 / 1.3, 0.95 - 0.04 / 1.4], "exp_avg": [0.03, 0.04]}),
    (MARS | {"optimize_1d": True}, [[0.3, 0.4]], {"exp_avg": [0.225, 0.3]}),
)
# Then -0.2: the mean of 0.225 and c = -0.2 + 0.5 * (-0.2 - 0.3) = -0.45 is below 0: p = 0.85, then 0.85 * 0.95 + 0.1.
MARS_LION = {"lr": 0.1, "beta": 0.5, "weight_decay": 0.5, "gamma": 0.5}
MARS_LION_BY_HAND = (
    (MARS_LION, [0.3], {"p": 0.85, "exp_avg": 0.225, "previous_grad": 0.3}),
    (MARS_LION, [0.3, -0.2], {"p": 0.9075, "exp_avg": -0.1125, "previous_grad": -0.2}),
    # Of length 7.5, c is made [0.6, -0.8].
    (MARS_LION, [[3.0, -4.0]], {"p": [0.85, 1.05], "exp_avg": [0.3, -0.4]}),
)


@reference
def stable_adamw(p, g, state, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-2):
    """Wortsman et al. 2023, Algorithm 2."""
    t = state["step"] = state.get("step", 0) + 1
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    rms = np.sqrt(np.sum(g**2 / np.maximum(v, eps**2)) / max(np.size(g), 1))
    lr = lr / np.maximum(1, rms)
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * decay - lr * m / (np.sqrt(v) + eps)


STABLE = {"lr": 0.1, "betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 0.5}
# First m = g, v = g^2, and the ratio is at most 1: p = 1 - 0.1 * (3 / 4 + 0.5). Then both betas are 0.25 / 0.75 = 1/3:
# of [3, 1] and [9, 1] v = [3 + 54, 1], the ratios are 81 / 57 and 1, their mean is 23 / 19.
STABLE_BY_HAND = (
    (STABLE, [3.0], {"p": 0.875, "exp_avg": 3.0, "exp_avg_sq": 9.0}),
    (
        STABLE,
        [[3.0, 1.0], [9.0, 1.0]],
        {
            "p": [
                0.875 - 0.1 * (19 / 23) ** 0.5 * (0.4375 + 7 / (57**0.5 + 1)),
                0.9 - 0.1 * (19 / 23) ** 0.5 * (0.45 + 0.5),
            ],
            "exp_avg": [7.0, 1.0],
            "exp_avg_sq": [57.0, 1.0],
        },
    ),
)
