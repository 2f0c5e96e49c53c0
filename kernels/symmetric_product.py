"""alpha x y^T + beta c, where that is symmetric, for a batch of matrices, in one launch with half the multiplications.

A program computes one tile of one matrix of the batch, on or under the diagonal, and also writes it, transposed, to
the other side. Most products of Muon's Newton-Schulz iteration are such: gram = x x^T, and those of polynomials of
it, which are symmetric and commute.

Programs go through a triangle row by row. Squares of tiles would reuse more in the L2 cache, which matters once x is
larger than that cache: 50 MB on an H100.
"""

import triton
import triton.language as tl

from .multi_tensor import convert, convert_nearest

# By bytes of an element and precision of the products: the depth of a tile. Like the rest of the launch shape, not yet
# measured on a GPU: it is what compiles without spills, its stages within the 99 KB of shared memory of the smallest
# NVIDIA GPUs since 8.0 and the 64 KB of AMD's.
DEPTHS = {(2, "ieee"): 64, (4, "tf32"): 32, (4, "ieee"): 16}


def launch_options(itemsize, precision, wide, warp_size):
    """What a launch passes beside the kernel's arguments.

    Triton 3.9 contracts to fused multiply-adds unless told otherwise and 3.10 will not, so it is told.

    Args:
        itemsize: bytes of an element.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``; of 16-bit ones, which are exact, ``"ieee"``.
        wide: whether sizes, strides and addresses allow accesses of 128 bits. Others, an element each, need registers
            that tiles of 128 do not leave.
        warp_size: threads a warp: 32 on NVIDIA, 64 on AMD's data-centre GPUs.
    """
    return {
        "PRECISION": precision,
        "BLOCK": 128 if wide else 64,
        "BLOCK_K": DEPTHS[itemsize, precision],
        "num_warps": 256 // warp_size,
        "num_stages": 3 if warp_size == 32 else 2,
        "enable_fp_fusion": True,
    }


def programs(batch, m, block):
    """Programs of a launch: one a tile on or under the diagonal of each ``(m, m)`` matrix."""
    tiles = -(-m // block)
    return batch * (tiles * (tiles + 1) // 2)


@triton.jit
def tile_of(program, TILES):
    """The row and column of a tile of a triangle of `TILES` rows, row i of i + 1 tiles, by the number of its program.

    Row i and row TILES - 1 - i together have TILES + 1 tiles, so the triangle folds into a rectangle, a pair a line; of
    an odd number of rows the middle one is half a line. All in integers: a rounded root may be off by a row.
    """
    pair = program // (TILES + 1)
    index = program % (TILES + 1)
    if index <= pair:
        row, column = pair, index
    else:
        row, column = TILES - 1 - pair, index - pair - 1
    return row, column


@triton.jit
def symmetric_product(
    x,
    y,
    c,
    out,
    x_strides,
    y_strides,
    c_strides,
    out_strides,
    M,
    K,
    alpha,
    beta,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute one tile of ``out[b] = alpha x[b] y[b]^T + beta c[b]``, and its mirror image.

    Args:
        x, y: ``(B, M, K)``. Their product is symmetric.
        c: ``(B, M, M)`` and symmetric, or None for no such term.
        out: ``(B, M, M)``.
        x_strides, y_strides, c_strides, out_strides: three each.
        PRECISION: of float32 products.
        INTERPRETED: whether Triton's interpreter runs this. It would multiply the bits of bfloat16 as integers.
    """
    tiles = tl.cdiv(M, BLOCK)
    triangle = tiles * (tiles + 1) // 2
    batch = (tl.program_id(0) // triangle).to(tl.int64)
    row, column = tile_of(tl.program_id(0) % triangle, tiles)
    # int64 before any product with a stride: an offset of 2^31 elements would wrap.
    i = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    x += batch * x_strides[0]
    y += batch * y_strides[0]
    left = x + i[:, None] * x_strides[1] + k[None, :] * x_strides[2]
    right = y + j[None, :] * y_strides[1] + k[:, None] * y_strides[2]
    left_step = tl.full((), BLOCK_K, tl.int64) * x_strides[2]
    right_step = tl.full((), BLOCK_K, tl.int64) * y_strides[2]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(left, mask=(i < M)[:, None] & (start + k < K)[None, :], other=0.0)
        b = tl.load(right, mask=(j < M)[None, :] & (start + k < K)[:, None], other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += left_step
        right += right_step
    total *= alpha
    inside = (i < M)[:, None] & (j < M)[None, :]
    if c is not None:
        c += batch * c_strides[0]
        added = tl.load(c + i[:, None] * c_strides[1] + j[None, :] * c_strides[2], mask=inside, other=0.0)
        total += beta * added.to(tl.float32)
    tile = convert_nearest(total, out.dtype.element_ty) if INTERPRETED else convert(total, out.dtype.element_ty)
    mirrored = tl.trans(tile)
    out += batch * out_strides[0]
    if row == column:
        # Both sides are the lower one's, however the GPU sums and whatever c has on the upper one.
        tile = tl.where(i[:, None] >= j[None, :], tile, mirrored)
    else:
        at = out + j[:, None] * out_strides[1] + i[None, :] * out_strides[2]
        tl.store(at, mirrored, mask=(j < M)[:, None] & (i < M)[None, :])
    tl.store(out + i[:, None] * out_strides[1] + j[None, :] * out_strides[2], tile, mask=inside)
