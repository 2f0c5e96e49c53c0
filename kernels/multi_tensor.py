"""The one kernel: any rule over any number of tensors in one launch.

A program updates one chunk of one tensor. It finds which in the chunk table, the tensor's addresses, size and scalar
row in the tensor table and the gradient column, and its scalars in the row table. A gradient address of 0 means that
the tensor has no gradient in this step: its programs do nothing.
"""

import triton
import triton.language as tl

from .rounding import MIXED_BY_ROLE, mix, round_bfloat16, round_float16

BLOCK = 1024  # elements a program


def launch_options(itemsizes, warp_size):
    """What a launch passes beside the kernel's arguments.

    Threads enough that each has one 128-bit access to the role with the widest elements. More elements a thread cost
    registers (118 for Adam in float64 at 8 of them) and, in mixed dtypes, a way through shared memory to the stores.
    Triton 3.9 contracts to fused multiply-adds unless told otherwise and 3.10 will not, so it is told.

    Args:
        itemsizes: bytes of an element, a role.
        warp_size: threads a warp: 32 on NVIDIA, 64 on AMD's data-centre GPUs.
    """
    return {"num_warps": BLOCK * max(itemsizes) // (16 * warp_size), "enable_fp_fusion": True}


# Columns of the tensor table: the number of elements, the scalar row, then an address a role but the gradient's.
NUMEL, ROW, FIRST_ADDRESS = 0, 1, 2
_NUMEL, _ROW, _FIRST_ADDRESS = tl.constexpr(NUMEL), tl.constexpr(ROW), tl.constexpr(FIRST_ADDRESS)


@triton.jit
def widen(value, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    # Neither the interpreter nor every GPU converts between 16 bits and float64 in one step.
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(COMPUTE)


@triton.jit
def convert(value, DTYPE: tl.constexpr):
    if DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def convert_nearest(value, DTYPE: tl.constexpr):
    """The interpreter truncates float32 to bfloat16; a GPU rounds. Round by bits first, and both agree."""
    if tl.bfloat16 == DTYPE:
        value = value.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return convert(value, DTYPE)


_MIXED_BY_ROLE = tl.constexpr(MIXED_BY_ROLE)


@triton.jit
def stored(value, mixed, role: tl.constexpr, DTYPE: tl.constexpr, ROUNDED: tl.constexpr, CONVERT: tl.constexpr):
    """A result as its role is kept; rounded stochastically where `ROUNDED` says so."""
    if ROUNDED[role]:
        bits = mix(mixed + role * _MIXED_BY_ROLE)
        if tl.bfloat16 == DTYPE:
            value = round_bfloat16(value.to(tl.float32), bits)
        else:
            value = round_float16(value.to(tl.float32), bits)
    return CONVERT(value, DTYPE)


@triton.jit
def update_chunk(
    addresses,
    start,
    mask,
    h,
    random,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUNDED: tl.constexpr,
    CONVERT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    pointers = ()
    values = ()
    for i in tl.static_range(len(DTYPES)):
        pointer = addresses[i].to(tl.pointer_type(DTYPES[i]))
        if ALIGNED:
            # After the cast: only there does the hint reach the access, which is scalar without it.
            pointer = tl.multiple_of(pointer, 16)
        pointer = pointer + start + offsets
        pointers = pointers + (pointer,)
        values = values + (widen(tl.load(pointer, mask=mask), DTYPES[i], COMPUTE),)
    g = values[1] * h[0]
    new = RULE(values[0], g, *values[2:], SCALARS(*h[1:]))
    tl.static_assert(len(new) == len(DTYPES) - 1, "a rule must return p and every state")
    mixed = offsets
    if len(ROUNDED) > 0:
        index = random[1] + start + offsets
        mixed = mix(mix(index.to(tl.int32)) + (index >> 32).to(tl.int32)) + random[0]
        tl.store(pointers[0], stored(new[0], mixed, 0, DTYPES[0], ROUNDED, CONVERT), mask=mask)
        for i in tl.static_range(2, len(DTYPES)):
            tl.store(pointers[i], stored(new[i - 1], mixed, i - 1, DTYPES[i], ROUNDED, CONVERT), mask=mask)
    else:
        tl.store(pointers[0], CONVERT(new[0], DTYPES[0]), mask=mask)
        for i in tl.static_range(2, len(DTYPES)):
            tl.store(pointers[i], CONVERT(new[i - 1], DTYPES[i]), mask=mask)


@triton.jit
def multi_tensor(
    chunks,
    tensors,
    gradients,
    rows,
    keys,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    FIELDS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROUNDED: tl.constexpr,
    CONVERT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update one chunk of one tensor by a rule.

    Args:
        chunks: int32 ``(programs, 2)``: the tensor and the chunk in it, a program.
        tensors: int64 ``(tensors, 1 + roles)``: see the columns above.
        gradients: int64 ``(tensors,)``: the address of each gradient, 0 for none.
        rows: ``(rows, 1 + len(FIELDS))`` in COMPUTE: the factor of the gradient, then the rule's scalars.
        keys: int64 ``(tensors, 2)``: what the random bits of a tensor depend on, and the index of its first
            element. Not read where nothing is rounded stochastically.
        RULE, SCALARS, FIELDS: the rule, its NamedTuple and that one's field names (the names are part of the cache
            key; the class is not).
        DTYPES: what each role (p, g, states) is stored as. COMPUTE: what the arithmetic is done in.
        ROUNDED: whether a result of the rule is rounded stochastically, for each of them, or empty.
        ALIGNED: whether every address is a multiple of 16.
    """
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    # int64 before the product: an offset of 2^31 elements would wrap to a negative one and pass every bound.
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    gradient = tl.load(gradients + tensor)
    if gradient != 0:
        COLUMNS: tl.constexpr = _FIRST_ADDRESS + len(DTYPES) - 1
        entry = tensors + tensor.to(tl.int64) * COLUMNS
        numel = tl.load(entry + _NUMEL)
        row = rows + tl.load(entry + _ROW) * (1 + len(FIELDS))
        addresses = (tl.load(entry + _FIRST_ADDRESS), gradient)
        for i in tl.static_range(2, len(DTYPES)):
            addresses = addresses + (tl.load(entry + _FIRST_ADDRESS + i - 1),)
        h = ()
        for i in tl.static_range(1 + len(FIELDS)):
            h = h + (tl.load(row + i),)
        random = ()
        if len(ROUNDED) > 0:
            random = (tl.load(keys + 2 * tensor).to(tl.int32), tl.load(keys + 2 * tensor + 1))
        if start + BLOCK <= numel:
            update_chunk(
                addresses, start, None, h, random, RULE, SCALARS, DTYPES, COMPUTE, ROUNDED, CONVERT, BLOCK, ALIGNED
            )
        else:
            mask = start + tl.arange(0, BLOCK) < numel
            update_chunk(
                addresses, start, mask, h, random, RULE, SCALARS, DTYPES, COMPUTE, ROUNDED, CONVERT, BLOCK, ALIGNED
            )
