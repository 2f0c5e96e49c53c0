"""The Newton-Schulz iteration of Muon, over many matrices at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...dispatch import GPUS
from .symmetric_product import symmetric_product

# Elements iterated at once: an iteration holds several batches of this size. A CPU's are to stay in its caches.
LARGEST_BATCH, LARGEST_ON_CPU = 1 << 26, 1 << 19


def newton_schulz(
    matrices: Sequence[Tensor],
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    scales: Sequence[float],
) -> list[Tensor]:
    r"""Bring the singular values of each matrix near 1.

    From :math:`X = M / \max(\lVert M \rVert_F, \epsilon)` on, `steps` times
    :math:`X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X`; of a matrix with more rows than columns its transpose
    is iterated. Matrices of one shape, or its transpose, are one batch of matrix products.

    Args:
        matrices: of two dimensions, real, on any devices. They are not written.
        coefficients: :math:`(a, b, c)`.
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

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
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
            batch = iterate(torch.stack([m.to(dtype) for m in wide]), coefficients, steps, eps)
            scaled = torch._foreach_mul(batch.unbind(), [scales[i] for i in own])
            for i, x in zip(own, scaled, strict=True):
                results[i] = x.mT if matrices[i].shape[0] > rows else x
    return [results[i] for i in range(len(matrices))]


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


def iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The iteration on a batch ``(B, M, N)`` of matrices with M <= N."""
    a, b, c = coefficients
    # Of a smaller norm the squares underflow. Zeros stay zeros even if eps is 0.
    eps = max(eps, torch.finfo(x.dtype).tiny ** 0.5)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    # Autograd records torch's products only.
    halved = x.device.type in GPUS and not torch.is_grad_enabled()
    for _ in range(steps):
        if halved:
            gram = symmetric_product(x)
            polynomial = symmetric_product(gram, alpha=c, beta=b, c=gram)
        else:
            gram = torch.bmm(x, x.mT)
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
