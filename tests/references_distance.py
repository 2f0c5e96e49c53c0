"""References of optimizers that estimate how far the minimum is, from the papers, as references.py says how; and steps
worked out by hand.
"""

import numpy as np
from references_runner import reference


@reference(of_model=("d", "d_max", "d_numerator"))
def prodigy(
    p, g, state, lr=1.0, betas=(0.9, 0.999), beta3=None, eps=1e-8, weight_decay=0.0, decouple=True,
    use_bias_correction=False, safeguard_warmup=False, d0=1e-6, d_coef=1.0, growth_rate=float("inf"), slice_p=1,
):  # fmt: skip
    """Mishchenko & Defazio 2023, Algorithm 4, with what the authors' code adds: the bias corrections, the safeguard,
    the bound of the growth and the samples. There, too, a group whose lr is 0 keeps its states. A NaN estimate is none.
    """
    b1, b2 = betas
    b3 = np.sqrt(b2) if beta3 is None else beta3
    t = state["step"] = state.get("step", 0) + 1
    d, longest, numerator = state.get("d", d0), state.get("d_max", d0), state.get("d_numerator", 0.0)
    names = ("s", "p0") if slice_p == 1 else ("s_sampled", "p0_sampled")
    some = p if slice_p == 1 else p.reshape(-1)[::slice_p]
    p0 = state[names[1]] = state.get(names[1], some.copy())
    if weight_decay != 0 and not decouple:
        g = g + weight_decay * p
    rate = d * lr * (np.sqrt(1 - b2**t) / (1 - b1**t) if use_bias_correction else 1)
    m, v = (state.get(name, np.zeros_like(g)) for name in ("exp_avg", "exp_avg_sq"))
    own = g if slice_p == 1 else g.reshape(-1)[::slice_p]
    s = state.get(names[0], np.zeros_like(own))
    sums = np.zeros(2, np.result_type(g, np.float64))
    if lr > 0:
        m = b1 * m + d * (1 - b1) * g
        v = b2 * v + d**2 * (1 - b2) * g**2
        s = b3 * s + d / d0 * (d if safeguard_warmup else rate) * own
        sums = np.array([d / d0 * rate * np.sum(own * (p0 - some)), np.sum(np.abs(s))])
    state.update({"exp_avg": m, "exp_avg_sq": v, names[0]: s})
    inner, size = yield sums
    if size > 0:
        numerator = b3 * numerator + inner
        found = d_coef * numerator / size
        start = np.fmax(d, found) if d == d0 else d
        longest = np.fmax(longest, found)
        d = np.fmin(longest, start * growth_rate)
    state.update({"d": d, "d_max": longest, "d_numerator": numerator})
    decay = weight_decay * p if weight_decay != 0 and decouple else 0  # 0 * Inf would be NaN.
    return p - rate * decay - rate * m / (np.sqrt(v) + d * eps)


PRODIGY = {"betas": (0.5, 0.75), "beta3": 0.5, "eps": 1.0, "weight_decay": 0.5, "d0": 0.5}
# g = 4: nothing is known, as p = p0: s = 0.5 * 4 = 2, m = 0.5 * 0.5 * 4 = 1, v = 0.25 * 0.25 * 16 = 1, d stays 0.5:
# p = 1 - 0.5 * 0.5 - 0.5 * 1 / (1 + 0.5). Then g = 12: p0 - p = 7 / 12, n = 0.5 * 12 * 7 / 12 = 3.5,
# s = 1 + 6 = 7, m = 0.5 + 3 = 3.5, v = 0.75 + 9 = 9.75, and the estimate is 3.5 / 7 = 0.5; with d_coef = 2 it is 1:
# p = 5 / 12 * 0.75 - 0.5 * 3.5 / (sqrt(9.75) + 1). A growth of at most 1.5 is none while d = d0.
PRODIGY_BY_HAND = (
    (PRODIGY, [4.0], {"p": 5 / 12, "exp_avg": 1.0, "exp_avg_sq": 1.0, "s": 2.0, "p0": 1.0, "d": 0.5, "d_max": 0.5}),
    (
        PRODIGY | {"d_coef": 2.0},
        [4.0, 12.0],
        {
            "p": 0.3125 - 1.75 / (9.75**0.5 + 1),
            "exp_avg": 3.5,
            "exp_avg_sq": 9.75,
            "s": 7.0,
            "d": 1.0,
            "d_max": 1.0,
            "d_numerator": 3.5,
        },
    ),
    (PRODIGY | {"d_coef": 4.0, "growth_rate": 1.5}, [4.0, 12.0], {"d": 2.0, "d_max": 2.0, "d_numerator": 3.5}),
    # Coupled: g = 4.5. With the safeguard lr is not in s.
    (PRODIGY | {"decouple": False}, [4.0], {"exp_avg": 1.125, "s": 2.25, "p": 1 - 0.5 * 1.125 / (1.125 + 0.5)}),
    (PRODIGY | {"lr": 0.5, "safeguard_warmup": True}, [4.0], {"s": 2.0, "p": 0.875 - 0.25 / 1.5}),
    # sqrt(1 - 0.75) / (1 - 0.5) is 1 in the first step.
    (PRODIGY | {"use_bias_correction": True}, [4.0], {"p": 5 / 12, "s": 2.0}),
    # Of three elements the first and the third are sampled; what the second has is in no sum.
    (
        PRODIGY | {"d_coef": 2.0, "slice_p": 2},
        [[4.0, 1.0, 4.0], [12.0, -9.0, 12.0]],
        {"s_sampled": [7.0, 7.0], "p0_sampled": [1.0, 1.0], "d": 1.0, "d_numerator": 7.0},
    ),
)


@reference(of_model=("d", "numerator_weighted"))
def dadapt_adam(
    p, g, state, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decouple=False, use_bias_correction=False,
    d0=1e-6, growth_rate=float("inf"), layer_scale=1.0,
):  # fmt: skip
    """Defazio & Mishchenko 2023, Algorithm 5, with what the authors' code adds: decoupled decay, bias corrections, the
    bound of the growth, a scale. A group whose lr is 0 stands still. A NaN estimate is none.
    """
    b1, b2 = betas
    b3 = np.sqrt(b2)
    t = state["step"] = state.get("step", 0) + 1
    d, numerator = state.get("d", d0), state.get("numerator_weighted", 0.0)
    if weight_decay != 0 and not decouple:
        g = g + weight_decay * p
    rate = d * lr * (np.sqrt(1 - b2**t) / (1 - b1**t) if use_bias_correction else 1)
    m, v, s = (state.get(name, np.zeros_like(g)) for name in ("exp_avg", "exp_avg_sq", "s"))
    sums = np.zeros(2, np.result_type(g, np.float64))
    if lr > 0:
        inner = layer_scale * rate * np.sum(g * (s / (np.sqrt(v) + eps)))
        m = b1 * m + (1 - b1) * layer_scale * rate * g
        v = b2 * v + (1 - b2) * g**2
        s = b3 * s + (1 - b3) * rate * g
        sums = np.array([inner, layer_scale * np.sum(np.abs(s))])
    state.update({"exp_avg": m, "exp_avg_sq": v, "s": s})
    inner, size = yield sums
    if size > 0:
        numerator = b3 * numerator + (1 - b3) * inner
        d = np.fmax(d, np.fmin(numerator / ((1 - b3) * size), d * growth_rate))
    state.update({"d": d, "numerator_weighted": numerator})
    if lr == 0:
        return p
    decay = weight_decay * p if weight_decay != 0 and decouple else 0  # 0 * Inf would be NaN.
    return p - rate * decay - m / (np.sqrt(v) + eps)


DADAPT_ADAM = {"betas": (0.5, 0.25), "eps": 1.0, "weight_decay": 0.5, "d0": 0.5, "decouple": True}
# b3 = 0.5. g = 4: m = 0.5 * 0.5 * 4 = 1, v = 0.75 * 16 = 12, s = 0.5 * 0.5 * 4 = 1, n = 0, and d stays 0.5:
# p = 1 - 0.5 * 0.5 - 1 / (sqrt(12) + 1). Then g = 12: n = 0.5 * 0.5 * 12 * 1 / (sqrt(12) + 1), s = 0.5 + 3,
# m = 0.5 + 3, v = 3 + 108, and n / (0.5 * 3.5) = 0.384 is less than d.
DADAPT_ADAM_BY_HAND = (
    (DADAPT_ADAM, [4.0], {"p": 0.75 - 1 / (12**0.5 + 1), "exp_avg": 1.0, "exp_avg_sq": 12.0, "s": 1.0, "d": 0.5}),
    (
        DADAPT_ADAM,
        [4.0, 12.0],
        {"exp_avg": 3.5, "exp_avg_sq": 111.0, "s": 3.5, "numerator_weighted": 3 / (12**0.5 + 1), "d": 0.5},
    ),
    # Of g = 4 twice with b2 = 0.75^2 and b3 = 0.75: v = 0.4375 * 16 = 7, s = 0.25 * 0.5 * 4 = 0.5, then n = 0.25 * 0.5
    # * 4 * 0.5 / (sqrt(7) + 1), s = 0.375 + 0.5 = 0.875, and n / (0.25 * 0.875) = 0.313 is less than d.
    (
        DADAPT_ADAM | {"betas": (0.5, 0.5625), "weight_decay": 0.0},
        [4.0, 4.0],
        {"s": 0.875, "numerator_weighted": 0.25 / (7**0.5 + 1), "d": 0.5},
    ),
    # Coupled: g = 4.5. A scale multiplies the step.
    (DADAPT_ADAM | {"decouple": False, "layer_scale": 2.0}, [4.0], {"exp_avg": 2.25, "s": 1.125}),
)


@reference(of_model=("d", "numerator_weighted"))
def dadapt_lion(p, g, state, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, d0=1e-6):
    """The authors' code. A group whose lr is 0 stands still. sign(NaN) is 0, as torch's; a NaN estimate is none."""
    b1, b2 = betas
    b3 = np.sqrt(b2)
    d, numerator = state.get("d", d0), state.get("numerator_weighted", 0.0)
    rate = d * lr
    m, s = (state.get(name, np.zeros_like(g)) for name in ("exp_avg", "s"))
    u = b1 * m + (1 - b1) * g
    u = np.where(np.isnan(u), 0, np.sign(u))
    sums = np.zeros(2, np.result_type(g, np.float64))
    if lr > 0:
        m, inner = b2 * m + (1 - b2) * rate * g, rate * np.sum(u * s)
        s = b3 * s + (1 - b3) * rate * u
        sums = np.array([inner, np.sum(np.abs(s))])
    state.update({"exp_avg": m, "s": s})
    inner, size = yield sums
    if size > 0:
        numerator = b3 * numerator + (1 - b3) * inner
        d = np.fmax(d, numerator / ((1 - b3) * size))
    state.update({"d": d, "numerator_weighted": numerator})
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - rate * decay - rate * u


DADAPT_LION = {"betas": (0.5, 0.25), "weight_decay": 0.5, "d0": 0.5}
# u = 1, m = 0.75 * 0.5 * 4 = 1.5, s = 0.5 * 0.5 = 0.25, p = 0.75 - 0.5. Then u = 1 again: n = 0.5 * 0.5 * 0.25 =
# 0.0625, s = 0.125 + 0.25 = 0.375, and 0.0625 / (0.5 * 0.375) = 1/3 is less than d; m = 0.375 + 1.5.
DADAPT_LION_BY_HAND = (
    (DADAPT_LION, [4.0], {"p": 0.25, "exp_avg": 1.5, "s": 0.25, "d": 0.5, "numerator_weighted": 0.0}),
    (
        DADAPT_LION,
        [4.0, 4.0],
        {"p": 0.25 * 0.75 - 0.5, "exp_avg": 1.875, "s": 0.375, "d": 0.5, "numerator_weighted": 0.0625},
    ),
)


@reference(of_model=("d", "numerator_weighted", "g0_norm"))
def dadapt_sgd(
    p, g, state, lr=1.0, momentum=0.0, weight_decay=0.0, d0=1e-6, growth_rate=float("inf")
):  # fmt: skip
    """Defazio & Mishchenko 2023, Algorithm 4, with what the authors' code has: the averaging, the norm of the first
    gradients without the decay, and twice the estimate. A group whose lr is 0 stands still. A NaN estimate is none.
    """
    d, numerator, norm = state.get("d", d0), state.get("numerator_weighted", 0.0), state.get("g0_norm", 0.0)
    x0, s = state.get("x0", p), state.get("s", np.zeros_like(g))
    own, g = g, g + weight_decay * p if weight_decay != 0 else g
    counts = 1.0 if lr > 0 else 0.0
    # |s + rate g|^2 by parts: the rate is known when the norm is.
    parts = (lr * np.sum(g * s), counts * np.sum(s * s), counts * lr**2 * np.sum(g * g), counts * np.sum(own * own))
    products, squares, gradients, first = yield np.array(parts)
    norm = norm if norm > 0 else np.sqrt(first)
    rate = d / norm if norm > 0 else 0 * d
    s = s + rate * lr * g
    numerator = numerator + rate * products
    size = squares + 2 * rate * products + rate**2 * gradients
    if size > 0:
        d = np.fmax(d, np.fmin(2 * numerator / np.sqrt(size), d * growth_rate))
    state.update({"s": s, "x0": x0, "d": d, "numerator_weighted": numerator, "g0_norm": norm})
    return momentum * p + (1 - momentum) * (x0 - s) if lr > 0 else p


DADAPT_SGD = {"momentum": 0.5, "d0": 0.5, "weight_decay": 0.5}
# g = 4 with the decay is 4.5, the rate 0.5 / 4: s = 0.5625, p = 0.5 + 0.5 * (1 - 0.5625) = 0.71875. Without the decay
# s = 0.5, p = 0.75; then g = 8: n = 0.125 * 8 * 0.5 = 0.5, s = 1.5, d = 2 * 0.5 / 1.5, p = 0.375 + 0.5 * (1 - 1.5) =
# 0.125; and then g = 4: the rate is 2 / 3 / 4, s = 1.5 + 2 / 3, n = 0.5 + 1, d = 3 / (13 / 6).
DADAPT_SGD_BY_HAND = (
    (DADAPT_SGD, [4.0], {"p": 0.71875, "s": 0.5625, "x0": 1.0, "d": 0.5, "g0_norm": 4.0}),
    (
        DADAPT_SGD | {"weight_decay": 0.0},
        [4.0, 8.0],
        {"p": 0.125, "s": 1.5, "d": 2 / 3, "numerator_weighted": 0.5, "g0_norm": 4.0},
    ),
    (DADAPT_SGD | {"weight_decay": 0.0}, [4.0, 8.0, 4.0], {"s": 13 / 6, "d": 18 / 13, "numerator_weighted": 1.5}),
    (DADAPT_SGD | {"weight_decay": 0.0, "growth_rate": 1.25}, [4.0, 8.0], {"d": 0.625}),
)
