"""The references whose update of an element needs its whole matrix. references.py says how they are called."""

import numpy as np
from references_runner import reference


@reference
def adafactor(p, g, state, lr=1e-2, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0):
    """Shazeer & Stern 2018, Algorithms 4 and 5, and a decoupled decay multiplied by lr.

    As torch documents it: lr bounds the relative step (the paper: 0.01); means in place of sums; eps1 is not added
    to g^2 but bounds the mean of the rows, and its square the estimate, from below. More than two dimensions are a
    batch of matrices. An eps1 of None is float64's machine epsilon: to judge another dtype, give that dtype's.
    """

    def mean(x, axis):
        return np.sum(x, axis, keepdims=True) / max(x.shape[axis], 1)  # Of nothing it is 0.

    def rms(x):
        return np.sqrt(np.sum(x**2) / max(x.size, 1))

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
    rows, columns = map(p.dtype.type, p.shape)
    b = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0) + (1 - momentum) * g
    update = momentum * b + (1 - momentum) * g if nesterov else b
    if adjust_lr_fn == "match_rms_adamw":
        scale = p.dtype.type(0.2) * np.sqrt(max(rows, columns))
    elif adjust_lr_fn == "spectral_unclamped":
        scale = np.sqrt(rows / columns)
    else:
        scale = np.sqrt(max(1, rows / columns))
    decay = weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * (scale * newton_schulz(update, ns_coefficients, ns_steps, eps) + decay)
