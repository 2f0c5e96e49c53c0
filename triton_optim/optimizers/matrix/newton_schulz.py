"""The Newton-Schulz iteration of Muon, over many matrices at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...dispatch import GPUS
from .pieces import MatrixLike
from .symmetric_product import by_panels, symmetric_product

Triple: TypeAlias = tuple[float, float, float]

# Amsel et al. 2025, Algorithm 1, https://arxiv.org/abs/2505.16932, for singular values from 1e-3 on. Each polynomial is
# of x / 1.05, so that a value which rounding has put above 1 does not escape: with Gram matrices as Zhang et al. 2026
# have it, https://tridao.me/blog/2026/gram-newton-schulz/. The paper's is of x / 1.01, and of a matrix over 1.01 times
# its norm.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
PRESETS: dict[str, tuple[Triple, ...]] = {
    "polar_express": tuple((a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in _POLAR_EXPRESS)
}

# Elements iterated at once: an iteration holds several batches of this size. A CPU's are to stay in its caches; but in
# 16 bits its threads take a matrix each, and share a single one badly.
LARGEST_BATCH, LARGEST_ON_CPU, LARGEST_OF_16_BITS = 1 << 26, 1 << 19, 10 << 20
# The ratio of sides above which steps in the Gram matrix take fewer operations: see `advance`.
LONG = 1.5
# What rounding leaves in a Gram matrix grows by a^2 a step, in the directions of small singular values. So much it may
# grow before the Gram matrix is computed anew: more in the first phase, whose errors the later ones correct.
GROWTH_AT_FIRST, GROWTH = 150, 20


def newton_schulz(
    matrices: Sequence[Tensor | MatrixLike],
    coefficients: str | Sequence[float] | Sequence[Sequence[float]],
    steps: int,
    eps: float,
    scales: Sequence[float],
    fetch: Callable[[list[int]], list[Tensor]] | None = None,
) -> list[Tensor]:
    r"""Bring the singular values of each matrix near 1.

    From :math:`X = M / \max(\lVert M \rVert_F, \epsilon)` on, `steps` times
    :math:`X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X`; of a matrix with more rows than columns its transpose
    is iterated. Matrices of one shape, or its transpose, are one batch of matrix products.

    Where one side is longer than the other by half, a step changes the small Gram matrix :math:`X X^\top` alone, and
    every few steps :math:`X`: see :func:`advance`.

    Args:
        matrices: of two dimensions, real, on any devices. They are not written. With `fetch`, what they are like.
        coefficients: :math:`(a, b, c)`, or one such triple a step, or the name of a preset: see :func:`triples`.
        steps: number of iterations.
        eps: :math:`\epsilon`, the smallest norm that is divided by.
        scales: a factor of the result, a matrix.
        fetch: makes what is iterated in place of the matrices at some indices, and of their shapes, when it is their
            turn: new tensors, which may be overwritten.

    Returns:
        A matrix for each, of its shape, in the dtype of the iteration: see :func:`iterated_in`.

    Example:
        >>> import torch
        >>> from triton_optim.optimizers.matrix.newton_schulz import newton_schulz
        >>> m, = newton_schulz([torch.diag(torch.tensor([4.0, 1.0]))], (1.5, -0.5, 0.0), 20, 1e-7, [1.0])
        >>> m.float().round(decimals=4)
        tensor([[1., 0.],
                [0., 1.]])

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; in the Gram matrix, Zhang et al. 2026,
    https://tridao.me/blog/2026/gram-newton-schulz/.
    """
    own_triples, recorded = triples(coefficients, steps), torch.is_grad_enabled()
    alike: dict[Any, list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((m.device, iterated_in(m), min(m.shape), max(m.shape)), []).append(i)
    tall = [m.shape[0] > m.shape[1] for m in matrices]
    results: dict[int, Tensor] = {}
    for (device, dtype, rows, columns), indices in alike.items():
        at_once = batch_size(device, dtype, rows * columns)
        indices.sort(key=tall.__getitem__)  # those that lie alike use the same buffers
        buffers: list[Tensor | None] = []
        for start in range(0, len(indices), at_once):
            own = indices[start : start + at_once]
            fetched: Any = fetch(own) if fetch else [matrices[i] for i in own]
            wide = [m.mT if tall[i] else m for i, m in zip(own, fetched, strict=True)]
            x = normalized(wide, eps, dtype, owned=fetch is not None and not recorded)
            scaled = iterate(x, own_triples, buffers).unbind()
            own_scales = [scales[i] for i in own]
            if recorded:
                scaled = torch._foreach_mul(scaled, own_scales)
            else:
                torch._foreach_mul_(scaled, own_scales)
            for i, x in zip(own, scaled, strict=True):
                results[i] = x.mT if tall[i] else x
    return [results[i] for i in range(len(matrices))]


def batch_size(device: torch.device, dtype: torch.dtype, elements: int) -> int:
    """How many matrices of so many elements are iterated at once."""
    if device.type != "cpu":
        return max(1, LARGEST_BATCH // max(elements, 1))
    if dtype.itemsize > 2:
        return max(1, LARGEST_ON_CPU // max(elements, 1))
    found, threads = LARGEST_OF_16_BITS // max(elements, 1), torch.get_num_threads()
    return max(1, found - found % threads if found > threads else found)


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
    if not hasattr(rows, "__len__"):
        raise ValueError(
            f"Invalid ns_coefficients: {coefficients!r} is no preset. Use {', '.join(map(repr, PRESETS))}, three "
            "numbers (a, b, c), or three numbers for each step."
        )
    if len(rows) == 3 and not any(isinstance(row, (tuple, list)) for row in rows):
        rows = [tuple(rows)] * steps
    for row in rows:
        if not isinstance(row, (tuple, list)) or len(row) != 3 or not all(hasattr(x, "__float__") for x in row):
            raise ValueError(
                f"Invalid ns_coefficients: {coefficients}. Give three numbers, (a, b, c), or three for each step."
            )
    if len(rows) != steps:
        raise ValueError(
            f"Invalid ns_steps: {steps}, where ns_coefficients={coefficients!r} are of {len(rows)} steps. "
            f"Give ns_steps={len(rows)}, or one triple for all steps."
        )
    return [tuple(map(float, row)) for row in rows]  # type: ignore[misc]


def iterated_in(matrix: Tensor | MatrixLike) -> torch.dtype:
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


def normalized(matrices: Sequence[Tensor], eps: float, dtype: torch.dtype, owned: bool = False) -> Tensor:
    """A batch of the matrices, each divided by its norm, or by `eps` if that is larger: in at least float32, and
    rounded to `dtype` once. Where they are `owned` they may be overwritten.
    """
    alone = len(matrices) == 1
    x = matrices[0].unsqueeze(0) if alone else torch.stack(list(matrices))
    wide = torch.promote_types(x.dtype, torch.float32)
    # Of a smaller norm the squares underflow. Zeros stay zeros even if eps is 0.
    eps = max(eps, torch.finfo(wide).tiny ** 0.5)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide).clamp(min=eps)
    x = x.div_(norm) if owned and x.dtype == wide else x / norm
    # Products of 16 bits copy what does not lie as a contiguous matrix or its transpose does, and panels of either.
    return x if x.dtype == dtype else x.to(dtype, memory_format=torch.contiguous_format)


def iterate(x: Tensor, coefficients: Sequence[Triple], buffers: list[Tensor | None]) -> Tensor:
    """The iteration on a batch ``(B, M, N)`` of normalized matrices with M <= N, which are overwritten.

    Args:
        buffers: those that the last batch of these sizes left, or none. On a CPU new memory costs as much as several
            products of small matrices, or a tenth of one of large ones.
    """
    if torch.is_grad_enabled():  # autograd records torch's products, into new memory
        for a, b, c in coefficients:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    if x.device.type != "cpu":
        buffers[:] = [None] * 5
    elif not buffers or buffers[0].shape != x.shape or buffers[0].stride() != x.stride():  # type: ignore[union-attr]
        square = (x.shape[0], x.shape[1], x.shape[1])
        buffers[:] = [torch.empty_like(x), *(x.new_empty(square) for _ in range(4))]
    long = x.shape[2] > LONG * x.shape[1]
    for phase in phases(coefficients) if long else [[triple] for triple in coefficients]:
        following = advance(x, phase, buffers)
        if buffers[0] is not None:
            buffers[0] = x
        x = following
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


def advance(x: Tensor, phase: Sequence[Triple], buffers: Sequence[Tensor | None]) -> Tensor:
    r"""Take the steps of a phase.

    With :math:`R = X X^\top` and :math:`Z = b R + c R^2`, a step makes :math:`(a I + Z) X` of X, and
    :math:`(a I + Z) R (a I + Z)` of R. So R alone tells the factors of all steps; their product Q multiplies X at the
    end. All but X are polynomials of R: symmetric, and every product of two as well.

    For n rows and r n columns, a phase of k steps takes :math:`4 r + 8 k - 6` times :math:`n^3` operations; where
    symmetric products are halved, :math:`3 r + 4 k - 3`. A phase of one is the ordinary iteration. So five steps take

    ===  =====================  =============================
    r    one by one (halved)    3 and 2 in a phase (halved)
    ===  =====================  =============================
    1    30 (20)                36 (20)
    2    50 (35)                44 (26)
    4    90 (65)                60 (38)
    8    170 (125)              92 (62)
    ===  =====================  =============================

    Args:
        x: a batch ``(B, M, N)``.
        phase: coefficients of each of its steps.
        buffers: where the result may be written, then four of ``(B, M, M)``; None for new memory.
    """
    out, gram, z, spare, factor = buffers
    gram = product(x, x, out=gram)
    for i, (a, b, c) in enumerate(phase):
        z = product(gram, gram, c, b, gram, out=z)
        if i < len(phase) - 1:
            spare = product(z, gram, 1.0, a, gram, out=spare)
            gram = product(z, spare, 1.0, a, spare, out=gram)
        elif i == 0:
            return torch.baddbmm(x, z, x, beta=a, out=out)
        if i == 0:
            factor, z = z, factor
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            assert factor is not None
            factor, spare = product(z, factor, 1.0, a, factor, out=spare), factor
    assert factor is not None
    return torch.bmm(factor, x, out=out)


def product(
    x: Tensor, y: Tensor, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """alpha x y^T + beta c, which is symmetric, the fastest way; in `out` where that helps."""
    if x.device.type in GPUS:
        return symmetric_product(x, alpha, beta, c, y=y)
    return by_panels(x, y, alpha, beta, c, out)
