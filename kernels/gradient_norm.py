"""The norm of all gradients, and from it what the step multiplies them by: one reading pass, the same bits on every
run.

A program of `partial_norms` adds up a run of the chunks that `multi_tensor` updates, whatever tensors they are of, and
one program of `gradient_stats` the sums of all: in an order that depends on nothing but the sizes. A gradient address
of 0 means that the tensor has none.
"""

import triton
import triton.language as tl

from .multi_tensor import BLOCK, NUMEL, widen

CHUNKS = 16  # a program


def launch_options(itemsize, warp_size):
    """Threads enough that each has one 128-bit access to a chunk.

    Args:
        itemsize: bytes of an element.
        warp_size: threads a warp.
    """
    return {"num_warps": BLOCK * itemsize // (16 * warp_size), "enable_fp_fusion": True}


_NUMEL, _BLOCK, _CHUNKS = tl.constexpr(NUMEL), tl.constexpr(BLOCK), tl.constexpr(CHUNKS)


# An int argument of 1, or a multiple of 16, would else be compiled for.
@triton.jit(do_not_specialize=["count", "columns"])
def partial_norms(
    chunks,
    tensors,
    gradients,
    partials,
    count,
    columns,
    power,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The sum of the powers of a run of chunks, or their largest magnitude.

    Args:
        chunks, tensors, gradients: as of `multi_tensor`.
        partials: float64 ``(programs, 2)``: the sum, and whether an element is not finite (not 0).
        count, columns: the number of chunks, and of columns of `tensors`.
        power: float64 ``(1,)``: what the magnitudes are raised to where KIND is "p".
        KIND: "1", "2", "p" or "inf".
        DTYPE: of the gradients. COMPUTE: what the arithmetic is done in.
        ALIGNED: whether every address is a multiple of 16.
    """
    program = tl.program_id(0)
    total = tl.zeros((_BLOCK,), COMPUTE)
    faults = tl.zeros((_BLOCK,), tl.int32)
    offsets = tl.arange(0, _BLOCK)
    for k in range(_CHUNKS):
        chunk = program.to(tl.int64) * _CHUNKS + k
        if chunk < count:
            tensor = tl.load(chunks + 2 * chunk)
            start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * _BLOCK
            numel = tl.load(tensors + tensor.to(tl.int64) * columns + _NUMEL)
            gradient = tl.load(gradients + tensor)
            if gradient != 0:
                pointer = gradient.to(tl.pointer_type(DTYPE))
                if ALIGNED:
                    pointer = tl.multiple_of(pointer, 16)
                pointer = pointer + start + offsets
                if start + _BLOCK <= numel:
                    x = tl.load(pointer)
                else:
                    x = tl.load(pointer, mask=start + offsets < numel, other=0.0)
                x = tl.abs(widen(x, DTYPE).to(COMPUTE))
                faults += tl.where(x < float("inf"), 0, 1)
                if KIND == "inf":
                    total = tl.maximum(total, x, propagate_nan=tl.PropagateNan.ALL)
                elif KIND == "1":
                    total += x
                elif KIND == "2":
                    total += x * x
                else:
                    total += tl.where(x == 0, 0.0, tl.exp(tl.load(power) * tl.log(x)))
    if KIND == "inf":
        # What tl.max drops.
        largest = tl.max(tl.where(total == total, total, 0.0), axis=0)
        whole = tl.where(tl.sum((total != total).to(tl.int32), axis=0) > 0, float("nan"), largest)
    else:
        whole = tl.sum(total, axis=0)
    tl.store(partials + 2 * program, whole.to(tl.float64))
    tl.store(partials + 2 * program + 1, tl.sum(faults, axis=0).to(tl.float64))


@triton.jit
def stats_of(
    partials,
    count,
    max_norm,
    grad_scale,
    found_inf,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    FOUND: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the step's gradients are multiplied by, whether to skip the step (not 0), the norm of the gradients without
    their scale, and whether an element is not finite (not 0). Arguments as of `gradient_stats`.
    """
    factor = tl.full((), 1.0, tl.float64)
    skip = tl.full((), 0.0, tl.float64)
    norm = tl.full((), 0.0, tl.float64)
    faults = tl.full((), 0.0, tl.float64)
    if SCALED:
        factor = 1.0 / tl.load(grad_scale).to(tl.float64)
    if FOUND:
        skip = tl.where(tl.load(found_inf) != 0, 1.0, 0.0).to(tl.float64)
    if KIND != "none":
        total = tl.zeros((BLOCK,), tl.float64)
        broken = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, count, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(partials + 2 * offsets, mask=offsets < count, other=0.0)
            broken += tl.load(partials + 2 * offsets + 1, mask=offsets < count, other=0.0)
            total += x
        faults = tl.sum(broken, axis=0)
        norm = tl.sqrt(tl.sum(total, axis=0)) * factor
        clip = tl.load(max_norm) / (norm + 1e-6)
        factor = factor * tl.where(clip > 1.0, 1.0, clip)
        if SKIP:
            skip = tl.where(faults != 0, 1.0, 0.0).to(tl.float64)
    return factor, skip, norm, faults


@triton.jit
def store_stats(stats, factor, skip, norm, faults):
    """Write the four numbers."""
    tl.store(stats, factor)
    tl.store(stats + 1, skip)
    tl.store(stats + 2, norm)
    tl.store(stats + 3, faults)


# Of the tables that are a user's or a part of a table, none need be aligned.
@triton.jit(do_not_specialize=["count", "max_norm", "grad_scale", "found_inf"])
def gradient_stats(
    stats,
    partials,
    count,
    max_norm,
    grad_scale,
    found_inf,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    FOUND: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norm, and what the step's gradients are multiplied by.

    Args:
        stats: float64 ``(4,)``, written: of `stats_of`.
        partials: float64 ``(count, 2)``: of `partial_norms`. Not read where KIND is "none".
        max_norm: float64 ``(1,)``: the largest norm that is allowed.
        grad_scale: float32 ``(1,)``: what the gradients have been multiplied by. Not read unless SCALED.
        found_inf: float32 ``(1,)``: whether an element is not finite (not 0). Not read unless FOUND.
        KIND: "2", or "none" where there is no norm.
        SKIP: whether an element that is not finite, by this pass, skips the step.
    """
    factor, skip, norm, faults = stats_of(
        partials, count, max_norm, grad_scale, found_inf, KIND, SCALED, FOUND, SKIP, BLOCK
    )
    store_stats(stats, factor, skip, norm, faults)
