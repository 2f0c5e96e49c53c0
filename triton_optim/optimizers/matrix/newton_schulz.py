"""The Newton-Schulz iteration of Muon, over many matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...dispatch import GPUS
from .symmetric_product import PANEL, by_panels, symmetric_product

Triple: TypeAlias = tuple[float, float, float]

# Amsel et al. 2025, https://arxiv.org/abs/2505.16932, for singular values from 1e-3 on. Each polynomial is of x / 1.05,
# so that a value which rounding has put above 1 does not escape.
_POLAR_EXPRESS = (
    (8.2872, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9487, -2.9089, 0.5518),
    (3.3184, -2.4885, 0.5100),
    (2.3007, -1.6689, 0.4188),
)
PRESETS: dict[str, tuple[Triple, ...]] = {
    "polar_express": tuple((a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in _POLAR_EXPRESS)
}

# Elements iterated at once: an iteration holds several batches of this size. A CPU's are to stay in its caches.
LARGEST_BATCH, LARGEST_ON_CPU = 1 << 26, 1 << 19
# The ratio of sides above which steps are taken in the Gram matrix: from there on it takes fewer operations, see `advance`.
LONG = 1.5
# What rounding leaves in a Gram matrix grows by a^2 a step, in the directions of small singular values. So much it may
# grow before the Gram matrix is computed anew: more in the first phase, whose errors the later ones correct.
GROWTH_AT_FIRST, GROWTH = 150, 20


def newton_schulz(
    matrices: Sequence[Tensor],
    coefficients: str | Sequence[float] | Sequence[Sequence[float]],
    steps: int,
    eps: float,
    scales: Sequence[float],
) -> list[Tensor]:
    r"""Bring the singular values of each matrix near 1.

    From :math:`X = M / \max(\lVert M \rVert_F, \epsilon)` on, `steps` times
    :math:`X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X`; of a matrix with more rows than columns its transpose
    is iterated. Matrices of one shape, or its transpose, are one batch of matrix products.

    Where one side is longer than the other by half, a step changes the small Gram matrix :math:`X X^\top` alone, and
    every few steps :math:`X`: see :func:`advance`.

    Args:
        matrices: of two dimensions, real, on any devices. They are not written.
        coefficients: :math:`(a, b, c)`, or one such triple a step, or the name of a preset: see :func:`triples`.
        steps: number of iterations.
        eps: :math:`\epsilon`, the smallest norm that is divided by.
        scales: a factor of the result, a matrix.

    Returns:
        A matrix for each, of its shape, in the dtype of the iteration: see :func:`iterated_in`.

    Example:
        >>> import torch
        >>> from triton_optim.optimizers.matrix.newton_schulz import newton_schulz
        >>> m, = newton_schulz([torch.diag(torch.tensor([4.0, 1.0]))], (1.5, -0.5, 0.0), 20, 1e-7, [1.0])
        >>> m.round(decimals=4)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; in the Gram matrix, Zhang et al. 2026,
    https://tridao.me/blog/2026/gram-newton-schulz/.
    """
    own_triples = triples(coefficients, steps)
    alike: dict[Any, list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((m.device, iterated_in(m), min(m.shape), max(m.shape)), []).append(i)
    results: dict[int, Tensor] = {}
    for (device, dtype, rows, columns), places in alike.items():
        largest = LARGEST_ON_CPU if device.type == "cpu" else LARGEST_BATCH
        at_once = max(1, largest // max(rows * columns, 1))
        for start in range(0, len(places), at_once):
            own = places[start : start + at_once]
            wide = [matrices[i].mT if matrices[i].shape[0] > rows else matrices[i] for i in own]
            x = iterate(normalized(wide, eps, dtype), own_triples)
            scaled = torch._foreach_mul(x.unbind(), [scales[i] for i in own])
            for i, x in zip(own, scaled, strict=True):
                results[i] = x.mT if matrices[i].shape[0] > rows else x
    return [results[i] for i in range(len(matrices))]


def triples(coefficients: str | Sequence[float] | Sequence[Sequence[float]], steps: int) -> list[Triple]:
    """Coefficients of each step.

    Args:
        coefficients: three numbers for all steps, three numbers a step, or the name of a preset, which has its own
            number of steps.
        steps: number of steps. Of coefficients for each step it must be their number.

    Raises:
        ValueError: they are none of these, or not so many.
    """
    rows: Any = PRESETS.get(coefficients) if isinstance(coefficients, str) else coefficients
    if rows is None:
        raise ValueError(
            f"Invalid ns_coefficients: {coefficients!r} is no preset. Use {', '.join(map(repr, PRESETS))}, three "
            "numbers (a, b, c), or three numbers for each step."
        )
    if len(rows) == 3 and not any(isinstance(row, (tuple, list)) for row in rows):
        rows = [tuple(rows)] * steps
    for row in rows:
        if not isinstance(row, (tuple, list)) or len(row) != 3:
            raise ValueError(
                f"Invalid ns_coefficients: {coefficients}. Give three numbers, (a, b, c), or three for each step."
            )
    if len(rows) != steps:
        raise ValueError(
            f"Invalid ns_steps: {steps}, where ns_coefficients={coefficients!r} are of {len(rows)} steps. "
            f"Give ns_steps={len(rows)}, or one triple for all steps."
        )
    return [tuple(map(float, row)) for row in rows]  # type: ignore[misc]


def iterated_in(matrix: Tensor) -> torch.dtype:
    """bfloat16, which the iteration bears, where the device multiplies it many times faster; without instructions for
    it, a CPU is several times slower.
    """
    if matrix.device.type in GPUS:
        return torch.bfloat16
    if matrix.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if matrix.device.type == "cpu" and cpu_multiplies_bfloat16() else torch.float32


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it (AVX512_BF16), or tiles (AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of which a release of torch may lack one
    return any(getattr(torch.cpu, name, bool)() for name in names)


def normalized(matrices: Sequence[Tensor], eps: float, dtype: torch.dtype) -> Tensor:
    """A batch of the matrices, each divided by its norm, or by `eps` if that is larger: in at least float32, and
    rounded to `dtype` once.
    """
    x = torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)
    wide = torch.promote_types(x.dtype, torch.float32)
    # Of a smaller norm the squares underflow. Zeros stay zeros even if eps is 0.
    eps = max(eps, torch.finfo(wide).tiny ** 0.5)
    return (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide).clamp(min=eps)).to(dtype)


def iterate(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """The iteration on a batch ``(B, M, N)`` of normalized matrices with M <= N."""
    long = x.shape[2] > LONG * x.shape[1]
    for phase in phases(coefficients) if long else [[triple] for triple in coefficients]:
        x = advance(x, phase)
    return x


def phases(coefficients: Sequence[Triple]) -> list[list[Triple]]:
    """The steps between which the Gram matrix is computed anew: of torch's coefficients 3, and then 2 at a time."""
    found: list[list[Triple]] = []
    growth = 0.0
    for triple in coefficients:
        if not found or growth > (GROWTH_AT_FIRST if len(found) == 1 else GROWTH):
            found.append([])
            growth = 1.0
        found[-1].append(triple)
        growth *= triple[0] ** 2
    return found


def advance(x: Tensor, phase: Sequence[Triple]) -> Tensor:
    r"""Take the steps of a phase.

    With :math:`R = X X^\top` and :math:`Z = b R + c R^2`, a step makes :math:`(a I + Z) X` of X, and
    :math:`(a I + Z) R (a I + Z)` of R. So R alone tells the factors of all steps; their product Q multiplies X at the
    end. All but X are polynomials of R: symmetric, and every product of two as well.

    For n rows and r n columns, a phase of one step, which is the ordinary iteration, takes :math:`4 r + 2` times
    :math:`n^3` operations; one of k > 1 steps :math:`4 r + 8 k - 6`. Where symmetric products are halved, it is
    :math:`3 r + 1` and :math:`3 r + 4 k - 3`. So five steps take

    =====  =====================  =============================
    r      one by one (halved)    3 and 2 in a phase (halved)
    =====  =====================  =============================
    1      30 (20)                36 (20)
    2      50 (35)                44 (26)
    4      90 (65)                60 (38)
    8      170 (125)              92 (62)
    =====  =====================  =============================
    """
    gram = product(x, x)
    factor: Tensor | None = None
    for i, (a, b, c) in enumerate(phase):
        z = product(gram, gram, c, b, gram)
        last = i == len(phase) - 1
        if last and factor is None:
            return torch.baddbmm(x, z, x, beta=a)
        if not last:
            half = product(z, gram, 1.0, a, gram)
            gram = product(z, half, 1.0, a, half)
        if factor is None:
            factor = z.clone()
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            factor = product(z, factor, 1.0, a, factor)
    return x if factor is None else torch.bmm(factor, x)


def product(x: Tensor, y: Tensor, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None) -> Tensor:
    """The symmetric alpha x y^T + beta c, in the fastest way there is."""
    if not torch.is_grad_enabled():  # autograd records torch's products only
        if x.device.type in GPUS:
            return symmetric_product(x, alpha, beta, c, y=y)
        if x.device.type == "cpu" and x.shape[1] >= 2 * PANEL:
            return by_panels(x, y, alpha, beta, c)
    return torch.bmm(x, y.mT) if c is None else torch.baddbmm(c, x, y.mT, beta=beta, alpha=alpha)
