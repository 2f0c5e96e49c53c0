"""References of optimizers that hold parameters, or their updates, to a norm, from the papers, as references.py says
how; and steps worked out by hand.
"""

import numpy as np
from references_matrix import frobenius, muon_momentum, muon_scale, newton_schulz
from references_runner import reference


def along(p, u, lr, radius):
    """Wen et al. 2025, R Normalize(W - lr R Normalize(u)); of 0 the direction is 0."""
    direction = u / frobenius(u) if frobenius(u) != 0 else u
    moved = p - lr * radius * direction
    return radius * moved / frobenius(moved) if frobenius(moved) != 0 else moved


@reference
def muonh(
    p, g, state, lr=5e-3, momentum=0.95, nesterov=True, ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5,
):  # fmt: skip
    """Wen et al. 2025, Hyperball of Muon's update."""
    if "initial_norms" not in state:
        state["initial_norms"] = np.array([frobenius(p)])
    u = newton_schulz(muon_momentum(p, g, state, momentum, nesterov), ns_coefficients, ns_steps, eps)
    return along(p, muon_scale(p, None) * u, lr, state["initial_norms"][0])


@reference
def adamh(p, g, state, lr=5e-3, betas=(0.9, 0.95), eps=1e-8):
    """Wen et al. 2025, Hyperball of the update of Kingma & Ba 2015, Algorithm 1."""
    b1, b2 = betas
    if "initial_norm" not in state:
        state["initial_norm"] = frobenius(p)
    t = state["step"] = state.get("step", 0) + 1
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g**2
    return along(p, m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps), lr, state["initial_norm"])


BALL = {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1.0}
# (options, gradients, after) as table.ByHand. Of [1, 1] R = sqrt(2), and with g = [2, 0] u = [2 / 3, 0], of direction
# [1, 0]: p - 0.5 sqrt(2) [1, 0], of norm sqrt(2.5 - sqrt(2)).
ALONG = 1 - 0.5**0.5
LENGTH = (ALONG**2 + 1) ** 0.5
ADAMH_BY_HAND = (
    (
        BALL,
        [[2.0, 0.0]],
        {
            "p": [2**0.5 * ALONG / LENGTH, 2**0.5 / LENGTH],
            "exp_avg": [1.0, 0.0],
            "exp_avg_sq": [1.0, 0.0],
            "initial_norm": 2**0.5,
        },
    ),
    # A number keeps its size, and changes its sign where the step is longer than it: 1 - 3, then -1 + 3.
    (BALL | {"lr": 3.0}, [2.0], {"p": -1.0}),
    (BALL | {"lr": 3.0}, [2.0, -8.0], {"p": 1.0, "exp_avg": -3.5, "initial_norm": 1.0}),
)
ORTHOGONAL = {
    "lr": 0.5, "momentum": 0.0, "nesterov": False, "ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 20,
}  # fmt: skip
# Of four ones R = 2. O = [[1, 0], [0, 0]] is as long as a step of 0.5 * 2 makes it: p = [[0, 1], [1, 1]], of norm
# sqrt(3). Of O = [[1, 0], [0, 1]], of norm sqrt(2), it is 1 - 1 / sqrt(2) on the diagonal.
DIAGONAL = 1 - 0.5**0.5
WHOLE = (2 * DIAGONAL**2 + 2) ** 0.5
# The second after the first: 1 / sqrt(2) less on the diagonal.
SIDE = 2 / 3**0.5
THEN = (0.5 + 2 * SIDE**2 + (SIDE - 0.5**0.5) ** 2) ** 0.5
MUONH_BY_HAND = (
    (
        ORTHOGONAL,
        [[[3.0, 0.0], [0.0, 0.0]]],
        {"p": [[0.0, 2 / 3**0.5], [2 / 3**0.5, 2 / 3**0.5]], "initial_norms": [2.0]},
    ),
    (
        ORTHOGONAL,
        [[[2.0, 0.0], [0.0, 2.0]]],
        {"p": [[2 * DIAGONAL / WHOLE, 2 / WHOLE], [2 / WHOLE, 2 * DIAGONAL / WHOLE]]},
    ),
    (
        ORTHOGONAL,
        [[[3.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]]],
        {
            "p": [[-2 * 0.5**0.5 / THEN, 2 * SIDE / THEN], [2 * SIDE / THEN, 2 * (SIDE - 0.5**0.5) / THEN]],
            "initial_norms": [2.0],
        },
    ),
)


@reference
def scion(
    p, g, state, lr=1e-3, momentum=0.1, norm="auto", scale=1.0, unconstrained=False,
    ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5,
):  # fmt: skip
    """Pethick et al. 2025, Algorithms 1 and 2 (unconstrained), with the oracles of its Tables 2 to 4; in the authors'
    code each division is by 1e-8 more.
    """
    d = state["momentum_buffer"] = (1 - momentum) * state.get("momentum_buffer", 0) + momentum * g
    update = scale * oracle(d, norm, ns_coefficients, eps, ns_steps)
    keep = 1 if unconstrained else 1 - lr
    return keep * p - lr * update


def oracle(d, norm, ns_coefficients, eps, ns_steps):
    """What is farthest along d in the ball of the norm."""
    if norm == "auto":
        norm = "spectral" if np.ndim(d) >= 2 else "rms"
    if norm == "rms":
        return d / (np.sqrt(np.sum(d**2) / max(np.size(d), 1)) + 1e-8)
    out, inside = map(d.dtype.type, d.shape[:2])
    if norm == "sign":
        return np.where(np.isnan(d), 0, np.sign(d)) / inside
    if norm == "columns":
        return d / (np.sqrt(np.sum(d**2, 0, keepdims=True) / out) + 1e-8)
    if norm == "rows":
        return d / (np.sqrt(np.sum(d**2, 1, keepdims=True) * inside) + 1e-8)
    if norm == "embedding":
        return d / (np.sqrt(np.sum(d**2, 1, keepdims=True) / inside) + 1e-8)
    kernel = np.prod(d.shape[2:])
    o = newton_schulz(d.reshape(len(d), -1), ns_coefficients, ns_steps, eps).reshape(d.shape)
    factor = np.sqrt(out / inside)
    return o * (max(factor, 1) if norm == "spectral_max" else factor) / kernel


TURN = {"lr": 0.1, "momentum": 0.5, "scale": 2.0}
FEW = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 20}
# Beside these gradients 1e-8 is nothing.
X, Y = 3e8, 4e8
# d = [1.5, 2], of root mean square sqrt(3.125): p = 0.9 - 0.1 * 2 * d / sqrt(3.125). Then d = [0.75, 1].
SCION_BY_HAND = (
    (TURN, [[X, Y]], {"p": [0.9 - 0.3 / 3.125**0.5, 0.9 - 0.4 / 3.125**0.5], "momentum_buffer": [X / 2, Y / 2]}),
    (TURN, [[X, Y], [0.0, 0.0]], {"momentum_buffer": [X / 4, Y / 4]}),
    # Of 2 rows and 1 column [3, 4] is 5 long: sqrt(2) * [0.6, 0.8].
    (TURN | FEW, [[[X], [Y]]], {"p": [[0.9 - 0.2 * 2**0.5 * 0.6], [0.9 - 0.2 * 2**0.5 * 0.8]]}),
    (TURN | FEW | {"unconstrained": True}, [[[X, Y]]], {"p": [[1 - 0.2 * 0.5**0.5 * 0.6, 1 - 0.2 * 0.5**0.5 * 0.8]]}),
    (TURN | FEW | {"norm": "spectral_max"}, [[[X, Y]]], {"p": [[0.9 - 0.12, 0.9 - 0.16]]}),
    # A convolution of 1 channel to 1 with a kernel of 2: [0.6, 0.8] / 2.
    (TURN | FEW, [[[[X, Y]]]], {"p": [[[0.9 - 0.06, 0.9 - 0.08]]]}),
    (TURN | {"norm": "sign"}, [[[X, -Y]]], {"p": [[0.8, 1.0]]}),
    # Rows of norm 5 become [0.6, 0.8] / sqrt(2), and [0.6, 0.8] * sqrt(2) where they are vectors of an embedding.
    (TURN | {"norm": "rows"}, [[[X, Y]]], {"p": [[0.9 - 0.12 / 2**0.5, 0.9 - 0.16 / 2**0.5]]}),
    (TURN | {"norm": "embedding"}, [[[X, Y]]], {"p": [[0.9 - 0.12 * 2**0.5, 0.9 - 0.16 * 2**0.5]]}),
    (TURN | {"norm": "columns"}, [[[X], [Y]]], {"p": [[0.9 - 0.12 * 2**0.5], [0.9 - 0.16 * 2**0.5]]}),
)
