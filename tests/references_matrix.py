"""The references whose update of an element needs its whole matrix. references.py says how they are called."""

import numpy as np
from references_runner import reference


def mean(x, axis):
    return np.sum(x, axis, keepdims=True) / max(x.shape[axis], 1)  # Of nothing it is 0.


def rms(x):
    return np.sqrt(np.sum(x**2) / max(np.size(x), 1))


@reference
def adafactor(p, g, state, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0):
    """Shazeer & Stern 2018, Algorithms 4 and 5, and a decoupled decay multiplied by lr.

    As torch documents it: lr bounds the relative step (the paper: 0.01); means in place of sums; eps1 is not added
    to g^2 but bounds the mean of the rows, and its square the estimate, from below. More than two dimensions are a
    batch of matrices. An eps1 of None is float64's machine epsilon: to judge another dtype, give that dtype's.
    """

    def average(name, new):
        w = t**beta2_decay
        state[name] = (1 - w) * state.get(name, 0) + w * new
        return state[name]

    t = state["step"] = p.dtype.type(state.get("step", 0) + 1)
    eps1 = np.finfo(np.float64).eps if eps[0] is None else eps[0]
    alpha = max(eps[1], rms(p)) * min(lr, 1 / np.sqrt(t))
    if g.ndim > 1:
        r, c = average("row_var", mean(g**2, -1)), average("col_var", mean(g**2, -2))
        v = r * c / np.maximum(mean(r, -2), eps1)
    else:
        v = average("variance", g**2)
    u = g / np.sqrt(np.maximum(v, eps1**2))
    if weight_decay != 0:
        p = p - lr * weight_decay * p
    return p - alpha * u / max(1, rms(u) / d)


def newton_schulz(x, coefficients, steps, eps):
    """Each singular value s of x / max(|x|, eps) becomes a s + b s^3 + c s^5, again and again."""
    a, b, c = coefficients
    if x.shape[0] > x.shape[1]:  # The smaller of the two Gram matrices: the same result.
        return newton_schulz(x.T, coefficients, steps, eps).T
    x = x / np.maximum(np.sqrt(np.sum(x**2)), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@reference
def muon(
    p, g, state, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=(3.4445, -4.775, 2.0315),
    eps=1e-7, ns_steps=5, adjust_lr_fn=None,
):  # fmt: skip
    """Jordan et al. 2024 (the post "Muon"), with the learning rates of Liu et al. 2025, section 2.2, and of
    Bernstein 2025 (the post "Deriving Muon"), too.

    As torch computes it, not as it documents it: the momentum is an average, (1 - momentum) of the new, which the
    normalization cancels but the state shows, and eps is not added to the norm but bounds it. torch iterates in
    bfloat16. The decay is multiplied by lr before its adjustment.
    """
    update = muon_momentum(p, g, state, momentum, nesterov)
    scale = muon_scale(p, adjust_lr_fn)
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * (scale * newton_schulz(update, ns_coefficients, ns_steps, eps) + decay)


def muon_momentum(p, g, state, momentum, nesterov):
    b = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0) + (1 - momentum) * g
    return momentum * b + (1 - momentum) * g if nesterov else b


def muon_scale(p, adjust_lr_fn):
    rows, columns = map(p.dtype.type, p.shape)
    if adjust_lr_fn == "match_rms_adamw":
        return p.dtype.type(0.2) * np.sqrt(max(rows, columns))
    if adjust_lr_fn == "spectral_unclamped":
        return np.sqrt(rows / columns)
    return np.sqrt(max(1, rows / columns))


def estimate(squares, state, name, w):
    """Shazeer & Stern 2018, Algorithm 2 (with means for sums): the running mean of squares, of a matrix from those of
    its rows and columns. w is the weight of what is new.
    """

    def average(part, new):
        state[part] = (1 - w) * state.get(part, 0) + w * new
        return state[part]

    if np.ndim(squares) < 2:
        return average(name, squares)
    r = average(f"{name}_row", mean(squares, -1)[..., 0])[..., None]
    c = average(f"{name}_col", mean(squares, -2)[..., 0, :])[..., None, :]
    return r / mean(r, -2) * c  # r * c might underflow


@reference
def adafactor_relative(
    p, g, state, lr=None, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None, weight_decay=0.0,
    scale_parameter=True, relative_step=None, warmup_init=False,
):  # fmt: skip
    """Shazeer & Stern 2018, Algorithms 4 to 6 and section 9, with a decoupled decay multiplied by the step size, which
    a given lr may take the place of.
    """
    t = state["step"] = p.dtype.type(state.get("step", 0) + 1)
    rho = min(1e-6 * t if warmup_init else 1e-2, 1 / np.sqrt(t)) if lr is None else lr
    alpha = rho * max(eps[1], rms(p)) if scale_parameter else rho
    u = g / np.sqrt(estimate(g**2 + eps[0], state, "exp_avg_sq", t**decay_rate))
    u = alpha * u / max(1, rms(u) / clip_threshold)
    if beta1 is not None:
        u = state["exp_avg"] = beta1 * state.get("exp_avg", 0) + (1 - beta1) * u
    decay = alpha * weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - decay - u


RELATIVE = {"eps": (1.0, 0.5), "clip_threshold": 0.5, "weight_decay": 1.0, "decay_rate": -1.0}
# p = 1, rho = 0.01. g = 1: v = 1 + 1, u = sqrt(1/2) is clipped to 0.5: p = 1 - 0.01 - 0.005. Then t = 2: the size is
# 0.985 * 0.01, w = 0.5, g = 3: v = (2 + 10) / 2, u = 3 / sqrt(6) is clipped to 0.5, and p = 0.985 less 0.00985 of 0.985
# and of 0.5. Of [[1, 3]] r = [2 + 10] / 2 = 6 is its own mean and c = [2, 10]: u = [1 / sqrt(2), 3 / sqrt(10)], whose
# RMS is sqrt((0.5 + 0.9) / 2): not above 2.
RELATIVE_BY_HAND = (
    (RELATIVE, [1.0], {"p": 0.985, "exp_avg_sq": 2.0}),
    (RELATIVE, [1.0, 3.0], {"p": 0.985 - 0.00985 * 1.485, "exp_avg_sq": 6.0}),
    (RELATIVE | {"beta1": 0.5}, [1.0], {"p": 0.9875, "exp_avg": 0.0025}),
    (RELATIVE | {"warmup_init": True}, [1.0], {"p": 1 - 1.5e-6}),
    (
        RELATIVE | {"clip_threshold": 2.0, "weight_decay": 0.0},
        [[[1.0, 3.0]]],
        {"p": [[1 - 0.01 / 2**0.5, 1 - 0.03 / 10**0.5]], "exp_avg_sq_row": [6.0], "exp_avg_sq_col": [2.0, 10.0]},
    ),
    (RELATIVE | {"lr": 0.1, "scale_parameter": False}, [1.0], {"p": 0.85}),
)


@reference
def came(
    p, g, state, lr=1e-4, eps=(1e-30, 1e-16), clip_threshold=1.0, betas=(0.9, 0.999, 0.9999), weight_decay=0.0
):  # fmt: skip
    """Luo et al. 2023, Algorithm 2, with means for sums, a decoupled decay, and momentum alone for vectors."""
    b1, b2, b3 = betas
    state["step"] = state.get("step", 0) + 1
    u = g / np.sqrt(estimate(g**2 + eps[0], state, "exp_avg_sq", 1 - b2))
    u = u / max(1, rms(u) / clip_threshold)
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * u
    if np.ndim(g) >= 2:
        m = m / np.sqrt(estimate((u - m) ** 2 + eps[1], state, "exp_avg_res", 1 - b3))
    decay = lr * weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - decay - lr * m


CAME = {"lr": 0.1, "eps": (1.0, 0.75), "clip_threshold": 0.5, "betas": (0.5, 0.75, 0.5), "weight_decay": 0.5}
# g = 1: v = 0.25 * 2, u = sqrt(2) is clipped to 0.5, m = 0.25: a vector has p = 1 - 0.05 - 0.025. A matrix of one
# element: (u - m)^2 + 0.75 = 0.8125, s = 0.40625 = 13 / 32. Then g = 1 again: v = 0.375 + 0.5, u = 0.5, m = 0.375,
# s = (13 / 32 + 0.125^2 + 0.75) / 2 = 75 / 128.
CAME_BY_HAND = (
    (CAME, [1.0], {"p": 0.925, "exp_avg": 0.25, "exp_avg_sq": 0.5}),
    (
        CAME,
        [[[1.0]]],
        {"p": [[0.95 - 0.025 * (32 / 13) ** 0.5]], "exp_avg_res_row": [13 / 32], "exp_avg_res_col": [13 / 32]},
    ),
    (CAME, [[[1.0]], [[1.0]]], {"exp_avg": [[0.375]], "exp_avg_sq_row": [0.875], "exp_avg_res_row": [75 / 128]}),
)


def frobenius(x):
    return np.sqrt(np.sum(x**2))


@reference
def normuon(
    p, g, state, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=(3.4445, -4.775, 2.0315),
    eps=1e-7, ns_steps=5, adjust_lr_fn=None, beta2=0.95,
):  # fmt: skip
    """Li et al. 2025, Algorithm 1, with the norm of the authors' code: that of the orthogonalized momentum, by Muon's
    factors.
    """
    o = newton_schulz(muon_momentum(p, g, state, momentum, nesterov), ns_coefficients, ns_steps, eps)
    r = beta2 * state.get("second_momentum_buffer", 0) + (1 - beta2) * mean(o**2, -1)
    state["second_momentum_buffer"] = r
    even = o / (np.sqrt(r) + 1e-10)
    even = even * frobenius(o) / np.maximum(frobenius(even), 1e-10)
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * (muon_scale(p, adjust_lr_fn) * even + decay)


@reference
def adamuon(
    p, g, state, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=(3.4445, -4.775, 2.0315),
    eps=1e-7, ns_steps=5, beta2=0.95,
):  # fmt: skip
    """Si et al. 2025, Algorithm 1, with Nesterov's momentum as in the authors' code."""
    u = muon_momentum(p, g, state, momentum, nesterov)
    o = newton_schulz(np.where(np.isnan(u), 0, np.sign(u)), ns_coefficients, ns_steps, eps)
    v = beta2 * state.get("second_momentum_buffer", 0) + (1 - beta2) * o**2
    state["second_momentum_buffer"] = v
    o = o / (np.sqrt(v) + 1e-8)
    o = p.dtype.type(0.2) * np.sqrt(p.dtype.type(p.size)) * o / np.maximum(frobenius(o), 1e-8)
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * (o + decay)


# Coefficients whose fixed point is 1, and no momentum: of diagonal matrices without a sign NS makes those of ones.
ORTHOGONAL = {
    "lr": 0.1, "weight_decay": 0.5, "momentum": 0.0, "nesterov": False, "ns_coefficients": (1.5, -0.5, 0.0),
    "ns_steps": 20, "beta2": 0.75,
}  # fmt: skip
FIRST, BOTH = [[3.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]]
# p = 1 everywhere, and becomes 0.95, then 0.9025, where nothing else moves it. O = [[1, 0], [0, 0]]: r = [0.125, 0] and
# O keeps its norm: 1 less 0.05 less 0.1. Then O = 1: r = [0.21875, 0.125], and the rows are divided by the roots of
# these, with the norm sqrt(2).
ROWS = [1 / (0.21875**0.5 + 1e-10), 1 / (0.125**0.5 + 1e-10)]
BY = 0.1 * (2 / (ROWS[0] ** 2 + ROWS[1] ** 2)) ** 0.5
NORMUON_BY_HAND = (
    (ORTHOGONAL, [FIRST], {"p": [[0.85, 0.95], [0.95, 0.95]], "second_momentum_buffer": [[0.125], [0.0]]}),
    (
        ORTHOGONAL,
        [FIRST, BOTH],
        {
            "p": [[0.8075 - BY * ROWS[0], 0.9025], [0.9025, 0.9025 - BY * ROWS[1]]],
            "second_momentum_buffer": [[0.21875], [0.125]],
        },
    ),
    # Of 4 rows and 1 column, and [3, 4, 0, 0], r = 0.25 * O^2.
    (ORTHOGONAL, [[[3.0], [4.0], [0.0], [0.0]]], {"second_momentum_buffer": [[0.09], [0.16], [0.0], [0.0]]}),
)
# The norm is 0.2 * sqrt(4) always. First of one element: p = 0.95 - 0.1 * 0.4, v = 0.25. Then of both: v is 0.4375 and
# 0.25.
ELEMENTS = [1 / (0.4375**0.5 + 1e-8), 1 / (0.25**0.5 + 1e-8)]
BY = 0.04 / (ELEMENTS[0] ** 2 + ELEMENTS[1] ** 2) ** 0.5
ADAMUON_BY_HAND = (
    (ORTHOGONAL, [FIRST], {"p": [[0.91, 0.95], [0.95, 0.95]], "second_momentum_buffer": [[0.25, 0.0], [0.0, 0.0]]}),
    (
        ORTHOGONAL,
        [FIRST, BOTH],
        {
            "p": [[0.8645 - BY * ELEMENTS[0], 0.9025], [0.9025, 0.9025 - BY * ELEMENTS[1]]],
            "second_momentum_buffer": [[0.4375, 0.0], [0.0, 0.25]],
        },
    ),
)
