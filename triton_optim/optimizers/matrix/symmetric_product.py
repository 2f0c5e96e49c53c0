"""alpha x y^T + beta c, where that is symmetric, for a batch of matrices, with about half the multiplications: what
Muon's iteration needs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ... import dispatch
from ...util.layout import all_aligned, layout, overlapping

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KERNEL_DTYPES = DTYPES[:3]
# Rows at a time of a product on a CPU: of fewer, copying a half takes what is spared by not multiplying it.
PANEL = 192


@torch.no_grad()
def symmetric_product(
    x: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    c: Tensor | None = None,
    out: Tensor | None = None,
    *,
    y: Tensor | None = None,
    backend: Literal["triton", "eager"] | None = None,
) -> Tensor:
    r"""A symmetric matrix for each matrix of a batch, the same to the bit on both sides of the diagonal.

    .. math::
        \mathrm{out}_b = \alpha\, x_b y_b^\top + \beta\, c_b

    On a GPU, one launch of a Triton kernel computes only the tiles on or under the diagonal. It multiplies in x's
    dtype, sums in float32 and rounds once. Products of float32 are those of torch's own: exact, or on NVIDIA in
    TensorFloat-32 where ``torch.backends.cuda.matmul.fp32_precision`` is ``"tf32"`` (``allow_tf32`` is its older name).
    Elsewhere, and for float64, it is ``torch.baddbmm``, of large matrices by panels of rows up to the diagonal. Nothing
    is recorded for autograd.

    Args:
        x: ``(B, M, K)`` in bfloat16, float16, float32 or float64, any of them possibly 0. It may have any strides; fast
            is 1 for the rows or the columns and, like M and K, a multiple of 16 for the others.
        alpha: factor of the product.
        beta: factor of `c`. At 0, `c` is not read, as in ``torch.baddbmm``.
        c: ``(B, M, M)``, symmetric: of each matrix only the lower triangle counts.
        out: ``(B, M, M)``, written and returned; a new tensor by default. It must not share memory with `x`, `y` or
            `c`.
        y: of x's shape, by default `x`. The product must be symmetric, as that of two symmetric matrices is which
            commute; of another, both sides are the lower one.
        backend: ``"triton"`` or ``"eager"``; by default Triton for tensors on a GPU.

    Raises:
        TypeError: a dtype that is none of these, or not x's.
        ValueError: a shape that does not fit, tensors on different devices, `beta` without `c`, `out` on the memory of
            `x`, of `y`, of `c` or of itself, or an unknown backend.
        RuntimeError: ``backend="triton"`` cannot run here.

    Example:
        >>> import torch
        >>> from triton_optim.optimizers.matrix.symmetric_product import symmetric_product
        >>> x = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])
        >>> symmetric_product(x, alpha=2.0)
        tensor([[[10., 12.],
                 [12., 18.]]])
    """
    _check(x, y, beta, c, out, backend)
    x = x.resolve_neg()
    y = x if y is None else y.resolve_neg()
    c = None if c is None or beta == 0 else c.resolve_neg()
    if out is None:
        out = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    if out.numel() == 0:
        return out
    obstacle = _unable(x)
    if backend == "triton" and obstacle is not None:
        raise RuntimeError(
            f'symmetric_product(backend="triton") cannot run on {x.dtype} tensors on {x.device}: {obstacle}. '
            "Leave backend out to choose automatically."
        )
    automatic = x.device.type in dispatch.GPUS and not dispatch.this_machine().interpreter
    if backend == "triton" or (backend is None and automatic and obstacle is None):
        _run_kernel(x, y, float(alpha), float(beta), c, out)
    else:
        _run_eagerly(x, y, alpha, beta, c, out)
    return out


def by_panels(
    x: Tensor, y: Tensor, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """:func:`symmetric_product` by torch's products, unchecked, and the same on both sides but for their roundings.

    Of n panels it multiplies 1/2 + 1/2n of the whole, on a CPU and if n > 1; the rest is copied. In 16 bits a CPU that
    multiplies by tiles takes longer for the panels than for the whole.
    """
    m = x.shape[1]
    count = m // PANEL
    if x.device.type != "cpu" or x.dtype.itemsize == 2 or count < 2:
        if c is None:
            return torch.baddbmm(x.new_empty(()), x, y.mT, beta=0, alpha=alpha, out=out)
        return torch.baddbmm(c, x, y.mT, beta=beta, alpha=alpha, out=out)
    if out is None:
        out = x.new_empty(x.shape[0], m, m)
    bounds = [m * i // count for i in range(count + 1)]
    for start, stop in pairwise(bounds):
        panel = out[:, start:stop, :stop]
        added = panel if c is None else c[:, start:stop, :stop]  # any tensor will do that beta=0 ignores
        torch.baddbmm(added, x[:, start:stop], y[:, :stop].mT, beta=beta, alpha=alpha, out=panel)
        if start:
            out[:, :start, start:stop].copy_(panel[..., :start].mT)
    return out


def launch(programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Start the kernel. The only place that does."""
    from ...kernels import symmetric_product as kernel

    kernel.symmetric_product[(programs,)](*arguments, **options)


def float32_precision(device: torch.device) -> Literal["ieee", "tf32"]:
    """How torch itself would multiply float32 matrices on this device, so that its setting holds here too."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32" if nvidia and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _run_kernel(x: Tensor, y: Tensor, alpha: float, beta: float, c: Tensor | None, out: Tensor) -> None:
    from ...backends.triton.launch import warp_size
    from ...kernels import symmetric_product as kernel

    batch, m, k = x.shape
    precision = float32_precision(x.device) if x.dtype == torch.float32 else "ieee"
    tensors = [t for t in (x, y, c, out) if t is not None]
    options = kernel.launch_options(x.element_size(), precision, _wide(m, k, tensors), warp_size(x.device))
    options["INTERPRETED"] = dispatch.this_machine().interpreter
    c_strides = (0, 0, 0) if c is None else c.stride()
    arguments = (x, y, c, out, x.stride(), y.stride(), c_strides, out.stride(), m, k, alpha, beta)
    programs = kernel.programs(batch, m, options["BLOCK"])
    if x.device.type not in dispatch.GPUS:
        launch(programs, arguments, options)
    else:
        with torch.get_device_module(x.device).device(x.device):
            launch(programs, arguments, options)


def _wide(m: int, k: int, tensors: list[Tensor]) -> bool:
    """Whether Triton, which looks for multiples of 16, can make every access one of 128 bits."""
    return (
        m % 16 == k % 16 == 0
        and all_aligned(t.data_ptr() for t in tensors)
        and all(1 in t.stride()[1:] and all(s == 1 or s % 16 == 0 for s in t.stride()) for t in tensors)
    )


def _run_eagerly(x: Tensor, y: Tensor, alpha: float, beta: float, c: Tensor | None, out: Tensor) -> None:
    by_panels(x, y, alpha, beta, c, out)
    # BLAS may sum the two sides in different orders.
    lower = torch.ones(out.shape[1:], dtype=torch.bool, device=out.device).tril()
    out.copy_(torch.where(lower, out, out.mT))


def _unable(x: Tensor) -> str | None:
    """Why the kernel cannot run on `x`, or None."""
    if x.dtype not in KERNEL_DTYPES:
        return f"the kernel sums in float32, too coarsely for {x.dtype}"
    return dispatch.unable("triton", dispatch.Request(x.device.type, x.dtype), dispatch.this_machine())


def _check(x: Tensor, y: Tensor | None, beta: float, c: Tensor | None, out: Tensor | None, backend: str | None) -> None:
    if backend not in (None, "triton", "eager"):
        raise ValueError(
            f'symmetric_product(backend={backend!r}): there is no such backend. Use "triton" or "eager", or leave '
            "backend out to choose automatically."
        )
    if x.dim() != 3:
        raise ValueError(
            f"symmetric_product takes a batch of matrices (B, M, K); x has shape {tuple(x.shape)}. "
            "For a single matrix pass x.unsqueeze(0)."
        )
    if x.dtype not in DTYPES:
        raise TypeError(
            f"symmetric_product has no product of {x.dtype}. Convert x to one of {', '.join(map(str, DTYPES))}."
        )
    if c is None and beta != 0:
        raise ValueError(f"symmetric_product(beta={beta}) has no c to multiply. Pass c, or leave beta at 0.")
    shape = (x.shape[0], x.shape[1], x.shape[1])
    for name, t, own in (("y", y, tuple(x.shape)), ("c", c, shape), ("out", out, shape)):
        if t is None:
            continue
        if t.shape != own:
            raise ValueError(
                f"symmetric_product: {name} has shape {tuple(t.shape)} for an x of shape {tuple(x.shape)}. "
                f"Make it {own}."
            )
        if t.dtype != x.dtype:
            raise TypeError(
                f"symmetric_product: {name} is {t.dtype} and x {x.dtype}. Convert one to the other's dtype."
            )
        if t.device != x.device:
            raise ValueError(
                f"symmetric_product: {name} is on {t.device} and x on {x.device}. Move them to one device."
            )
    if out is None:
        return
    if layout(out) == "overlapping":
        raise ValueError(
            f"symmetric_product: out has strides {out.stride()} for shape {tuple(out.shape)}, so that elements share "
            "memory and would overwrite each other. Pass a tensor that is not expanded."
        )
    for name, t in (("x", x), ("y", y), ("c", c)):
        if t is not None and overlapping([out, t]):
            raise ValueError(
                f"symmetric_product: out shares memory with {name}, which is still read while out is written. "
                "Pass another tensor as out, or leave it out."
            )
