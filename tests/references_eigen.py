"""The references whose update of a matrix is in an eigenbasis. references.py says how they are called.

Eigenvectors and factors are found here, in whatever arithmetic is asked for, and have one sign: of eigenvectors the sum
is not negative, of a factor Q the diagonal of R. No step depends on these signs.
"""

import itertools

import numpy as np
from references_runner import reference

SWEEPS = 8


def eigen(a):
    """The eigenvalues of a symmetric matrix, the largest first, and the eigenvectors: Jacobi's rotations."""
    a, vectors, n = a.copy(), np.eye(len(a), dtype=a.dtype), len(a)
    for i, j in list(itertools.combinations(range(n), 2)) * SWEEPS:
        if a[i, j] == 0:
            continue
        slope = (a[j, j] - a[i, i]) / (2 * a[i, j])
        tangent = np.copysign(1 / (abs(slope) + np.sqrt(slope**2 + 1)), slope)
        cosine = 1 / np.sqrt(tangent**2 + 1)
        turn = np.eye(n, dtype=a.dtype)
        turn[i, i] = turn[j, j] = cosine
        turn[i, j], turn[j, i] = tangent * cosine, -tangent * cosine
        a, vectors = turn.T @ a @ turn, vectors @ turn
    order = np.argsort(-np.diag(a), kind="stable")
    vectors = vectors[:, order]
    return np.diag(a)[order], vectors * np.where(vectors.sum(0) < 0, -1, 1).astype(a.dtype)


def orthonormal(a):
    """Q of a = QR: Householder's reflections. Of a column of zeros it is one of the unit matrix."""
    r, q = a.copy(), np.eye(len(a), dtype=a.dtype)
    for i in range(len(a) - 1):
        v = r[i:, i].copy()
        if not v[1:].any():
            continue
        v[0] += np.copysign(np.sqrt(np.sum(v**2)), v[0])
        v /= np.sqrt(np.sum(v**2))
        r[i:] -= 2 * np.outer(v, v @ r[i:])
        q[:, i:] -= 2 * np.outer(q[:, i:] @ v, v)
    return q * np.where(np.diag(r) < 0, -1, 1).astype(a.dtype)


def sides(p, max_precond_dim, precondition_1d):
    """The rows and columns of the matrix of a parameter, and which of the two have a preconditioner."""
    if p.ndim < 2 and not (precondition_1d and p.ndim == 1):
        return (p.size, 1), ()
    shape = (p.shape[0], p.size // max(p.shape[0], 1))
    return shape, tuple(side for side, n in zip("LR", shape, strict=True) if 1 < n <= max_precond_dim and p.size)


def into(x, state, taken):
    x = state["Q_L"].T @ x if "L" in taken else x
    return x @ state["Q_R"] if "R" in taken else x


def back(x, state, taken):
    x = state["Q_L"] @ x if "L" in taken else x
    return x @ state["Q_R"].T if "R" in taken else x


def squared(g, side):
    """g g' of the rows, g' g of the columns."""
    return g @ g.T if side == "L" else g.T @ g


def adam_in_the_basis(x, state, shape, taken, betas, eps, normalize_grads):
    """The update of Adam, without its bias corrections, in the eigenbasis, brought back."""
    b1, b2 = betas
    rotated = into(x, state, taken)
    m = b1 * state["exp_avg"].reshape(shape) + (1 - b1) * rotated
    v = b2 * state["exp_avg_sq"].reshape(shape) + (1 - b2) * rotated**2
    state["exp_avg"], state["exp_avg_sq"] = (s.reshape(state["exp_avg"].shape) for s in (m, v))
    u = back(m / (np.sqrt(v) + eps), state, taken)
    if normalize_grads:
        u = u / (1e-30 + np.sqrt(np.sum(u**2) / max(u.size, 1)))
    return u


def moved(p, u, t, lr, betas, weight_decay, correct_bias):
    """The decay comes after the update."""
    b1, b2 = betas
    size = lr * np.sqrt(1 - b2**t) / (1 - b1**t) if correct_bias else lr
    p = p - size * u.reshape(p.shape)
    return p - lr * weight_decay * p if weight_decay != 0 else p  # 0 * Inf would be NaN.


def begun(p, state):
    """The number of the update: the first gradient makes none."""
    state.setdefault("exp_avg", np.zeros_like(p))
    state.setdefault("exp_avg_sq", np.zeros_like(p))
    state["step"] = p.dtype.type(state.get("step", 0) + 1)
    return state["step"] - 1


def turned(state, shape, taken, bases):
    """The first moment in other bases."""
    m = back(state["exp_avg"].reshape(shape), state, taken)
    state |= bases
    state["exp_avg"] = into(m, state, taken).reshape(state["exp_avg"].shape)


@reference
def soap(
    p, g, state, lr=3e-3, betas=(0.95, 0.95), shampoo_beta=None, eps=1e-8, weight_decay=0.01,
    precondition_frequency=10, max_precond_dim=10000, precondition_1d=False, normalize_grads=False, correct_bias=True,
):  # fmt: skip
    """Vyas et al. 2024, Algorithms 3 and 4, with the authors' first step and order: eigenvectors sorted by their
    estimated eigenvalues, and the second moment with them.
    """
    shape, taken = sides(p, max_precond_dim, precondition_1d)
    t, beta, x = begun(p, state), betas[1] if shampoo_beta is None else shampoo_beta, g.reshape(shape)
    if t > 0:
        u = adam_in_the_basis(x, state, shape, taken, betas, eps, normalize_grads)
        p = moved(p, u, t, lr, betas, weight_decay, correct_bias)
    for side in taken:
        state[side] = beta * state.get(side, 0) + (1 - beta) * squared(x, side)
    if t == 0:
        state |= {f"Q_{side}": eigen(state[side])[1] for side in taken}
    elif t % precondition_frequency == 0:
        bases = {}
        for side in taken:
            q, axis = state[f"Q_{side}"], "LR".index(side)
            order = np.argsort(-np.diag(q.T @ state[side] @ q), kind="stable")
            v = np.take(state["exp_avg_sq"].reshape(shape), order, axis)
            state["exp_avg_sq"] = v.reshape(p.shape)
            bases[f"Q_{side}"] = orthonormal(state[side] @ q[:, order])
        turned(state, shape, taken, bases)
    return p


@reference
def kl_soap(
    p, g, state, lr=1e-4, betas=(0.9, 0.98), shampoo_beta=None, eps=1e-8, weight_decay=0.01,
    precondition_frequency=10, max_precond_dim=10000, precondition_1d=False, normalize_grads=False, correct_bias=False,
    init_factor=0.1,
):  # fmt: skip
    """Lin et al. 2025, KL-SOAP: each preconditioner of the gradient whitened by the other, whose eigenvalues are means
    of their own. As in the authors' code these start at 0.1, and no 1 / sqrt of one exceeds max(10, min(n, 4000)).
    """
    shape, taken = sides(p, max_precond_dim, precondition_1d)
    t, beta, x = begun(p, state), betas[1] if shampoo_beta is None else shampoo_beta, g.reshape(shape)
    other, count = {"L": "R", "R": "L"}, {"L": shape[1], "R": shape[0]}
    if t == 0:
        for side in taken:
            state[side] = (1 - beta) * squared(x, side) / count[side]
            state[f"Q_{side}"] = eigen(state[side])[1]
            state[f"eigenvalues_{side}"] = np.full(len(state[side]), init_factor, p.dtype)
        return p
    u = adam_in_the_basis(x, state, shape, taken, betas, eps, normalize_grads)
    p = moved(p, u, t, lr, betas, weight_decay, correct_bias)
    old = {side: state[f"eigenvalues_{side}"] for side in taken}
    inverse = {s: state[f"Q_{s}"] @ np.diag(1 / old[s]) @ state[f"Q_{s}"].T for s in taken}
    rotated = into(x, state, taken) ** 2
    for side in taken:
        axis = "LR".index(side)
        middle, weights = inverse.get(other[side]), old.get(other[side], np.ones(count[side], p.dtype))
        if side == "L":
            whitened, values = (x @ middle @ x.T if middle is not None else x @ x.T), rotated / weights
        else:
            whitened, values = (x.T @ middle @ x if middle is not None else x.T @ x), rotated / weights[:, None]
        state[side] = beta * state[side] + (1 - beta) * whitened / count[side]
        mean = beta * old[side] + (1 - beta) * np.sum(values, 1 - axis) / count[side]
        largest = p.dtype.type(max(10, min(shape[axis], 4000)))
        state[f"eigenvalues_{side}"] = np.maximum(mean, 1 / largest**2)
    if t % precondition_frequency == 0:
        turned(state, shape, taken, {f"Q_{s}": orthonormal(state[s] @ state[f"Q_{s}"]) for s in taken})
    return p


@reference
def shampoo(
    p, g, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-12, weight_decay=1e-5, precondition_frequency=100,
    start_preconditioning_step=None, max_precond_dim=8192, precondition_1d=False, grafting="adam", grafting_eps=1e-8,
    block_size=None,
):  # fmt: skip
    """Gupta et al. 2018, Algorithm 1, with the averages, bias corrections, late start and grafting of Shi et al. 2023,
    section 3: with a second beta of 1 the averages are sums. k preconditioners take the root of degree 2 k.
    Of blocks each is a matrix of its own.
    """
    if block_size is not None:
        options = (lr, betas, eps, weight_decay, precondition_frequency, start_preconditioning_step, max_precond_dim)
        return in_blocks(p, g, state, block_size, *options, precondition_1d, grafting, grafting_eps)
    b1, b2 = betas
    shape, taken = sides(p, max_precond_dim, precondition_1d)
    t = state["step"] = p.dtype.type(state.get("step", 0) + 1)
    start = precondition_frequency if start_preconditioning_step is None else start_preconditioning_step
    new, correction = (1, 1) if b2 == 1 else (1 - b2, 1 - b2**t)
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    m = grafted = m / (1 - b1**t)
    if grafting == "adam":
        v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + new * g**2
        grafted = m / (np.sqrt(v / correction) + grafting_eps)
    u = m.reshape(shape)
    for side in taken:
        state[side] = b2 * state.get(side, 0) + new * squared(g.reshape(shape), side)
        state.setdefault(f"root_{side}", np.eye(len(state[side]), dtype=p.dtype))
        if t == start or (t > start and t % precondition_frequency == 0):
            values, vectors = eigen(state[side] / correction)
            values = values - min(values.min(), 0) + eps
            state[f"root_{side}"] = vectors @ np.diag(values ** (p.dtype.type(-1) / (2 * len(taken)))) @ vectors.T
        root = state[f"root_{side}"]
        u = root @ u if side == "L" else u @ root
    if t < start or not taken:
        u = grafted
    elif grafting is not None:
        u = u * np.sqrt(np.sum(grafted**2)) / (np.sqrt(np.sum(u**2)) + 1e-16)
    decay = lr * weight_decay * p if weight_decay != 0 else 0  # 0 * Inf would be NaN.
    return p - lr * u.reshape(p.shape) - decay


def in_blocks(p, g, state, longest, *options):
    """The blocks of a matrix, of one shape and filled up with zeros, each updated on its own."""
    matrix = (len(p) if p.ndim else 1, -1) if p.size else p.shape
    counts = [max(-(-n // longest), 1) for n in p.reshape(matrix).shape]
    if counts == [1, 1] or p.ndim == 0 or (p.ndim == 1 and not options[7]):
        return shampoo.__wrapped__(p, g, state, *options)
    rows, columns = sizes = [-(-n // count) for n, count in zip(p.reshape(matrix).shape, counts, strict=True)]
    whole = [size * count for size, count in zip(sizes, counts, strict=True)]

    def filled(x):
        x = x.reshape(p.reshape(matrix).shape)
        return np.pad(x, [(0, n - m) for n, m in zip(whole, x.shape, strict=True)])

    new, moments, k = np.zeros(whole, p.dtype), {}, 0
    x, y, before = filled(p), filled(g), dict(state)
    for i in range(counts[0]):
        for j in range(counts[1]):
            here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            own = {n: filled(v)[here] if n.startswith("exp") else v[k] for n, v in before.items() if n != "step"}
            own |= {"step": before["step"]} if "step" in before else {}
            new[here] = shampoo.__wrapped__(x[here], y[here], own, *options)
            state["step"] = own.pop("step")
            for name, value in own.items():
                if name.startswith("exp"):
                    moments.setdefault(name, np.zeros(whole, p.dtype))[here] = value
                else:
                    state[name] = np.stack([*([] if k == 0 else state[name]), value])
            k += 1
    own = tuple(slice(n) for n in p.reshape(matrix).shape)
    state.update({name: value[own].reshape(p.shape) for name, value in moments.items()})
    return new[own].reshape(p.shape)


BASES = {
    "lr": 0.1, "betas": (0.5, 0.75), "shampoo_beta": 0.5, "eps": 1.0, "weight_decay": 0.5, "precondition_frequency": 1,
}  # fmt: skip


def diagonal(a, b):
    return [[a, 0.0], [0.0, b]]


# p = 1. The first gradient moves nothing: L = R = diag(9, 4) / 2, Q = I. Of the second m = diag(1, 2), v = diag(1, 4):
# u = diag(1 / 2, 2 / 3), both corrections are 1 / 2, and p = 0.95 (1 - 0.1 u). L = diag(4.25, 9): now the second
# eigenvalue is the larger one, so that both bases swap, and with them m and v. The third gradient is seen swapped, as
# diag(4, 2): m = diag(3, 1.5), v = diag(7, 1.75), and u is swapped back; corrections of 1 - 0.75^2 and 1 - 0.5^2.
GRADIENTS = [diagonal(3.0, 2.0), diagonal(2.0, 4.0), diagonal(2.0, 4.0)]
SWAPPED = [[0.0, 1.0], [1.0, 0.0]]
AT = (0.95 * 0.95, 0.95 * (1 - 0.2 / 3))
SIZE = 0.1 * (1 - 0.75**2) ** 0.5 / 0.75
THEN = (0.95 * (AT[0] - SIZE * 1.5 / (1.75**0.5 + 1)), 0.95 * (AT[1] - SIZE * 3 / (7**0.5 + 1)))
SOAP_BY_HAND = (
    (
        BASES,
        GRADIENTS[:1],
        {"p": [[1.0, 1.0]] * 2, "L": diagonal(4.5, 2.0), "Q_R": diagonal(1.0, 1.0), "exp_avg": [[0.0, 0.0]] * 2},
    ),
    (
        BASES,
        GRADIENTS[:2],
        {
            "p": [[AT[0], 0.95], [0.95, AT[1]]],
            "R": diagonal(4.25, 9.0),
            "Q_L": SWAPPED,
            "Q_R": SWAPPED,
            "exp_avg": diagonal(2.0, 1.0),
            "exp_avg_sq": diagonal(4.0, 1.0),
        },
    ),
    (
        BASES,
        GRADIENTS,
        {
            "p": [[THEN[0], 0.95**2], [0.95**2, THEN[1]]],
            "L": diagonal(4.125, 12.5),
            "exp_avg": diagonal(3.0, 1.5),
            "exp_avg_sq": diagonal(7.0, 1.75),
        },
    ),
)
# Of a vector it is Adam, which begins with the second gradient.
SOAP_BY_HAND += ((BASES, [1.0, 2.0], {"p": 0.95 * 0.95, "exp_avg": 1.0, "exp_avg_sq": 1.0}),)
# L = diag(9, 4) / 2 / 2, and the eigenvalues are 1. Then, of the second gradient, L = diag(2.25, 1) / 2 + diag(4, 16) /
# 2 / 2, and the eigenvalues are 1 / 2 and half the means of diag(4, 16). No swap: the columns keep their order. Of the
# third R = diag(2.125, 4.5) / 2 + diag(4 / 1.5, 16 / 4.5) / 4, and so do the eigenvalues.
KL_BASES = BASES | {"init_factor": 1.0}
KL_AT = (0.95 * (1 - 0.1 * 0.5), 0.95 * (1 - 0.1 * 2 / 3))
KL_SOAP_BY_HAND = (
    (KL_BASES, GRADIENTS[:1], {"p": [[1.0, 1.0]] * 2, "L": diagonal(2.25, 1.0), "eigenvalues_L": [1.0, 1.0]}),
    (
        KL_BASES,
        GRADIENTS[:2],
        {
            "p": [[KL_AT[0], 0.95], [0.95, KL_AT[1]]],
            "R": diagonal(2.125, 4.5),
            "Q_L": diagonal(1.0, 1.0),
            "exp_avg_sq": diagonal(1.0, 4.0),
            "eigenvalues_R": [1.5, 4.5],
        },
    ),
    (
        KL_BASES,
        GRADIENTS,
        {"R": diagonal(2.125 / 2 + 1 / 1.5, 4.5 / 2 + 4 / 4.5), "eigenvalues_L": [0.75 + 1 / 1.5, 2.25 + 4 / 4.5]},
    ),
)

SHAMPOO = {
    "lr": 0.1, "betas": (0.5, 1.0), "eps": 0.0, "weight_decay": 0.5, "precondition_frequency": 2, "grafting_eps": 1.0,
}  # fmt: skip
# p = 1, and sums. The first step is Adagrad's: of diag(3, 4) the corrected mean is itself, v = diag(9, 16),
# u = diag(3 / 4, 4 / 5). The second gradient makes L = diag(9 + 7, 16 + 65), whose roots of degree 4 are 2 and 3, and
# a mean of (3 / 4 + b / 2) / (3 / 4): u is diag(m / 4, m / 9), with the norm of diag(m / (4 + 1), m / (9 + 1)).
SUMS = [diagonal(3.0, 4.0), diagonal(7**0.5, 65**0.5)]
MEANS = (1 + 2 / 3 * 7**0.5, 4 / 3 + 2 / 3 * 65**0.5)
RATIO = ((MEANS[0] / 5) ** 2 + (MEANS[1] / 10) ** 2) ** 0.5 / ((MEANS[0] / 4) ** 2 + (MEANS[1] / 9) ** 2) ** 0.5
ONCE = (0.95 - 0.075, 0.95 - 0.08)
SHAMPOO_BY_HAND = (
    (SHAMPOO, SUMS[:1], {"p": [[ONCE[0], 0.95], [0.95, ONCE[1]]], "L": diagonal(9.0, 16.0), "root_L": np.eye(2)}),
    (
        SHAMPOO,
        SUMS,
        {
            "p": [
                [0.95 * ONCE[0] - 0.1 * RATIO * MEANS[0] / 4, 0.9025],
                [0.9025, 0.95 * ONCE[1] - 0.1 * RATIO * MEANS[1] / 9],
            ],
            "R": diagonal(16.0, 81.0),
            "root_R": diagonal(1 / 2, 1 / 3),
            "exp_avg_sq": diagonal(16.0, 81.0),
        },
    ),
    # Without grafting, of which the norm is nothing, and from the first step on: the root of diag(9, 16) twice.
    (
        SHAMPOO | {"grafting": None, "precondition_frequency": 1},
        SUMS[:1],
        {"p": [[0.95 - 0.1, 0.95], [0.95, 0.95 - 0.1]]},
    ),
    (SHAMPOO | {"grafting": "sgd"}, [2.0], {"p": 0.95 - 0.2}),
)
