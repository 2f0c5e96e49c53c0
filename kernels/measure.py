"""Sums over each tensor of what a rule makes of its elements: read for many tensors in one launch, added up in another.

A program of `measure` takes one chunk of one tensor, as one of `multi_tensor` does, and writes its sums; a program of
`sum_chunks` adds up those of one tensor, in an order that depends on nothing but its size. Of a tensor without a
gradient they are 0.
"""

import triton
import triton.language as tl

from .multi_tensor import NUMEL, ROW, addresses_of, read_chunk

_NUMEL, _ROW = tl.constexpr(NUMEL), tl.constexpr(ROW)

THREADS = 128  # of a program that adds up
TOGETHER = 512  # chunks that it takes at a time


@triton.jit
def sum_chunk(
    into,
    addresses,
    start,
    numel,
    factor,
    h,
    FULL: tl.constexpr,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    SUMS: tl.constexpr,
    CODECS: tl.constexpr,
    DTYPES: tl.constexpr,
    PER_ITEM: tl.constexpr,
    FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the sums of a chunk of a tensor: of all of it, or with a mask."""
    values, _pointers, there = read_chunk(
        addresses, start, numel, FULL, CODECS, DTYPES, PER_ITEM, FIRST, COMPUTE, BLOCK, BLOCK_SIZE, ALIGNED
    )
    found = RULE(values[0], values[1] * factor, *values[2:], SCALARS(*h))
    for i in tl.static_range(SUMS):
        own = found[i] if FULL else tl.where(there[FIRST[1]], found[i], 0.0)
        tl.store(into + i, tl.sum(own).to(tl.float64))


@triton.jit
def measure(
    chunks,
    tensors,
    gradients,
    rows,
    chunk_sums,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    FIELDS: tl.constexpr,
    SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    CODECS: tl.constexpr,
    DTYPES: tl.constexpr,
    PER_ITEM: tl.constexpr,
    FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """The sums of one chunk of one tensor.

    Args:
        chunks, tensors, gradients: as of `multi_tensor`.
        rows: ``(rows, WIDTH)`` in COMPUTE: the factor of the gradient, the rule's scalars.
        chunk_sums: float64 ``(programs, SUMS)``, written.
        RULE, SCALARS, FIELDS: what is summed, and its scalars, as of `multi_tensor`.
        SUMS: how many values the rule returns. COLUMNS: of `tensors`.
        CODECS, DTYPES, PER_ITEM, FIRST: of the roles that are read: p, g, states; as of `multi_tensor`.
        COMPUTE, BLOCK_SIZE, ALIGNED, SOURCE: as of `multi_tensor`.
    """
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    gradient = tl.load(gradients + tensor)
    into = chunk_sums + program.to(tl.int64) * SUMS
    entry = tensors + tensor.to(tl.int64) * COLUMNS
    numel = tl.where(gradient != 0, tl.load(entry + _NUMEL), 0)  # nothing is read of one without
    row = rows + tl.load(entry + _ROW) * WIDTH
    factor = tl.load(row)
    h = ()
    for i in tl.static_range(len(FIELDS)):
        h = h + (tl.load(row + 1 + i),)
    addresses = addresses_of(entry, gradient, FIRST[1], len(DTYPES))
    if start + BLOCK <= numel:
        sum_chunk(
            into, addresses, start, numel, factor, h, True, RULE, SCALARS, SUMS, CODECS, DTYPES, PER_ITEM, FIRST,
            COMPUTE, BLOCK, BLOCK_SIZE, ALIGNED,
        )  # fmt: skip
    else:
        sum_chunk(
            into, addresses, start, numel, factor, h, False, RULE, SCALARS, SUMS, CODECS, DTYPES, PER_ITEM, FIRST,
            COMPUTE, BLOCK, BLOCK_SIZE, ALIGNED,
        )  # fmt: skip


@triton.jit
def sum_chunks(chunk_sums, first, sums, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the sums of the chunks of one tensor.

    Args:
        chunk_sums: float64 ``(chunks, SUMS)``.
        first: int64 ``(tensors + 1,)``: the number of each tensor's first chunk, and of all chunks.
        sums: float64 ``(tensors, SUMS)``, written.
    """
    tensor = tl.program_id(0).to(tl.int64)
    begin = tl.load(first + tensor)
    end = tl.load(first + tensor + 1)
    for i in tl.static_range(SUMS):
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(begin, end, BLOCK):
            chunk = start + tl.arange(0, BLOCK)
            total += tl.load(chunk_sums + chunk * SUMS + i, mask=chunk < end, other=0.0)
        tl.store(sums + tensor * SUMS + i, tl.sum(total, axis=0))
