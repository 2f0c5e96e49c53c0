"""The one kernel: any rule over any number of tensors in one launch.

A program updates one chunk of one tensor. It finds which in the chunk table, the tensor's addresses, size and scalar
row in the tensor table and the gradient column, and its scalars in the row table. A gradient address of 0 means that
the tensor has no gradient in this step: its programs do nothing. Nor do any where the stats say to skip the step.
"""

import triton
import triton.language as tl

from .average import lerp
from .codecs import decode, encode, hashed, tensor_key

BLOCK = 1024  # elements a program


def launch_options(itemsizes, block_size, warp_size):
    """What a launch passes beside the kernel's arguments.

    Threads enough that each has one 128-bit access to the part with the widest elements. More elements a thread cost
    registers (118 for Adam in float64 at 8 of them) and, in mixed dtypes, a way through shared memory to the stores.
    With codes, 8 elements each, so that a warp of 32 finds the scale of 256 without shared memory.
    Triton 3.9 contracts to fused multiply-adds unless told otherwise and 3.10 will not, so it is told.

    Args:
        itemsizes: bytes of an item of each part that has one for every element.
        sharing: how many elements share a scale, or 0.
        warp_size: threads a warp: 32 on NVIDIA, 64 on AMD's data-centre GPUs.
    """
    widest = 2 if block_size else max(itemsizes)
    return {"num_warps": BLOCK * widest // (16 * warp_size), "enable_fp_fusion": True}


# Columns of the tensor table: the number of elements, the scalar row, then an address a part of each role but the
# gradient.
NUMEL, ROW, FIRST_ADDRESS = 0, 1, 2
_NUMEL, _ROW, _FIRST_ADDRESS = tl.constexpr(NUMEL), tl.constexpr(ROW), tl.constexpr(FIRST_ADDRESS)


@triton.jit
def widen(value, DTYPE: tl.constexpr):
    """What is stored as the arithmetic takes it: int32 or float32."""
    if DTYPE.is_int():
        value = value.to(tl.int32)
    elif DTYPE.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value


@triton.jit
def convert(value, DTYPE: tl.constexpr):
    """A value in another dtype."""
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


@triton.jit
def items(PER_ITEM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The items of a chunk, each of so many elements: numbered in one row, or in rows of `BLOCK_SIZE` elements."""
    if BLOCK_SIZE == 0:
        numbers = tl.arange(0, BLOCK)
    elif PER_ITEM == BLOCK_SIZE:
        numbers = tl.arange(0, BLOCK // BLOCK_SIZE)[:, None]
    else:
        rows = tl.arange(0, BLOCK // BLOCK_SIZE)[:, None]
        numbers = rows * (BLOCK_SIZE // PER_ITEM) + tl.arange(0, BLOCK_SIZE // PER_ITEM)[None, :]
    return numbers


@triton.jit
def read_chunk(
    addresses,
    start,
    numel,
    FULL: tl.constexpr,
    CODECS: tl.constexpr,
    DTYPES: tl.constexpr,
    PER_ITEM: tl.constexpr,
    FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The values of each role in a chunk; the pointers to the items of each part, and which of them are there."""
    pointers = ()
    there = ()
    parts = ()
    for i in tl.static_range(len(DTYPES)):
        # Before the pointer: after it, ptxas takes twice the registers for misaligned accesses on sm_90.
        item = items(PER_ITEM[i], BLOCK, BLOCK_SIZE)
        there = there + (start + item * PER_ITEM[i] < numel,)
        pointer = addresses[i].to(tl.pointer_type(DTYPES[i]))
        if ALIGNED:
            # After the cast: only there does the hint reach the access, which is scalar without it.
            pointer = tl.multiple_of(pointer, 16)
        pointers = pointers + (pointer + start // PER_ITEM[i] + item,)
        part = tl.load(pointers[i]) if FULL else tl.load(pointers[i], mask=there[i])
        parts = parts + (widen(part, DTYPES[i]),)
    values = ()
    for i in tl.static_range(len(CODECS)):
        # Triton 3.6 hands a tuple's strings on as plain ones, which `decode` does not take.
        values = values + (decode(parts[FIRST[i] : FIRST[i + 1]], tl.constexpr(CODECS[i])).to(COMPUTE),)
    return values, pointers, there


@triton.jit
def update_chunk(
    addresses,
    start,
    numel,
    factor,
    h,
    weight,
    key,
    FULL: tl.constexpr,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    CODECS: tl.constexpr,
    DTYPES: tl.constexpr,
    PER_ITEM: tl.constexpr,
    FIRST: tl.constexpr,
    AVERAGED: tl.constexpr,
    COMPUTE: tl.constexpr,
    RANDOM: tl.constexpr,
    CONVERT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update a chunk of a tensor: all of it, or with a mask."""
    offsets = items(1, BLOCK, BLOCK_SIZE)
    values, pointers, there = read_chunk(
        addresses, start, numel, FULL, CODECS, DTYPES, PER_ITEM, FIRST, COMPUTE, BLOCK, BLOCK_SIZE, ALIGNED
    )
    STATES: tl.constexpr = len(CODECS) - AVERAGED
    g = values[1] * factor
    new = RULE(values[0], g, *values[2:STATES], SCALARS(*h))
    tl.static_assert(len(new) == STATES - 1, "a rule must return p and every state")
    random = offsets
    if RANDOM:
        low, high, first_key, second_key = key
        index = ((high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)) + start + offsets
        random = hashed(index.to(tl.int32), (index >> 32).to(tl.int32), first_key, second_key)
    new = new[0:1] + (g,) + new[1:]
    stored = ()
    for i in tl.static_range(len(CODECS)):
        if i != 1:
            if i == STATES:
                value = lerp(values[i], decode(stored, tl.constexpr(CODECS[0])).to(COMPUTE), weight)
            else:
                value = new[i]
            if tl.constexpr(CODECS[i]) != "plain":
                value = value.to(tl.float32)
            if BLOCK_SIZE > 0 and not FULL:
                value = tl.where(start + offsets < numel, value, 0.0)
            kept = encode(value, random, i - (i > 1), tl.constexpr(CODECS[i]))
            for j in tl.static_range(len(kept)):
                part = CONVERT(kept[j], DTYPES[FIRST[i] + j])
                if AVERAGED and i == 0:
                    stored = stored + (widen(part, DTYPES[j]),)
                if FULL:
                    tl.store(pointers[FIRST[i] + j], part)
                else:
                    tl.store(pointers[FIRST[i] + j], part, mask=there[FIRST[i] + j])


@triton.jit
def addresses_of(entry, gradient, GRADIENT: tl.constexpr, PARTS: tl.constexpr):
    """The address of each part of a tensor: those in its entry of the table, and that of the gradient at its place."""
    addresses = ()
    for i in tl.static_range(PARTS):
        if i == GRADIENT:
            addresses = addresses + (gradient,)
        else:
            addresses = addresses + (tl.load(entry + (_FIRST_ADDRESS + i - (i > GRADIENT))),)
    return addresses


# An int argument would else be compiled for where it is 1, or a multiple of 16.
@triton.jit(do_not_specialize=["keys"])
def multi_tensor(
    chunks,
    tensors,
    gradients,
    rows,
    numbers,
    keys,
    stats,
    RULE: tl.constexpr,
    SCALARS: tl.constexpr,
    FIELDS: tl.constexpr,
    CODECS: tl.constexpr,
    DTYPES: tl.constexpr,
    PER_ITEM: tl.constexpr,
    FIRST: tl.constexpr,
    AVERAGED: tl.constexpr,
    STATS: tl.constexpr,
    BY_VALUE: tl.constexpr,
    COMPUTE: tl.constexpr,
    RANDOM: tl.constexpr,
    CONVERT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """Update one chunk of one tensor by a rule.

    Args:
        chunks: int32 ``(programs, 2)``: the tensor and the chunk in it, a program.
        tensors: int64 ``(tensors, 1 + parts)``: see the columns above.
        gradients: int64 ``(tensors,)``: the address of each gradient, 0 for none.
        rows: ``(rows, 1 + len(FIELDS) + AVERAGED)`` in COMPUTE: the factor of the gradient, the rule's scalars, the
            weight of the parameter in its average. BY_VALUE: the only row, as a tuple of float32 numbers.
        numbers: int32 ``(tensors, 3)``: the index of a tensor's first element, its lower and its upper half, and the
            parameter's index among all.
        keys: int32 ``(rows,)``: what else the random bits depend on; BY_VALUE: that of the only row. Neither is read
            where there are none.
        stats: float64 ``(2,)``: what all gradients are multiplied by, and whether to skip the step (not 0). Not read
            unless STATS.
        RULE, SCALARS, FIELDS: the rule, its NamedTuple and that one's field names (the names are part of the cache
            key; the class is not).
        CODECS: how each role (p, g, states) is kept; see codecs.py.
        DTYPES, PER_ITEM: of each part of each role, the dtype, and how many elements an item of it holds.
        FIRST: the number of each role's first part, and the number of parts.
        AVERAGED: whether the last role is an average of the parameter, as it is kept.
        COMPUTE: what the arithmetic is done in. RANDOM: whether a codec takes random bits.
        BLOCK_SIZE: how many elements share a scale, or 0.
        ALIGNED: whether every address is a multiple of 16.
        SOURCE: a hash of the rule's source. Triton 3.4 looks for a compiled kernel by the rule's name.
    """
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    # int64 before the product: an offset of 2^31 elements would wrap to a negative one and pass every bound.
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    gradient = tl.load(gradients + tensor)
    if STATS:
        gradient = tl.where(tl.load(stats + 1) == 0, gradient, 0)
    if gradient != 0:
        COLUMNS: tl.constexpr = _FIRST_ADDRESS + len(DTYPES) - 1
        WIDTH: tl.constexpr = 1 + len(FIELDS) + AVERAGED
        entry = tensors + tensor.to(tl.int64) * COLUMNS
        numel = tl.load(entry + _NUMEL)
        cells = ()
        row_key = keys
        if BY_VALUE:
            for i in tl.static_range(WIDTH):
                cells = cells + (tl.full((), rows[i], COMPUTE),)
        else:
            number = tl.load(entry + _ROW)
            for i in tl.static_range(WIDTH):
                cells = cells + (tl.load(rows + number * WIDTH + i),)
            if RANDOM:
                row_key = tl.load(keys + number)
        addresses = addresses_of(entry, gradient, FIRST[1], len(DTYPES))
        factor = cells[0]
        if STATS:
            factor = factor * tl.load(stats).to(COMPUTE)
        h = cells[1 : 1 + len(FIELDS)]
        weight = cells[WIDTH - 1] if AVERAGED else 0.0
        key = ()
        if RANDOM:
            own = numbers + 3 * tensor
            key = (tl.load(own), tl.load(own + 1)) + tensor_key(row_key, tl.load(own + 2))
        if start + BLOCK <= numel:
            update_chunk(
                addresses, start, numel, factor, h, weight, key, True, RULE, SCALARS, CODECS, DTYPES, PER_ITEM, FIRST,
                AVERAGED, COMPUTE, RANDOM, CONVERT, BLOCK, BLOCK_SIZE, ALIGNED,
            )  # fmt: skip
        else:
            update_chunk(
                addresses, start, numel, factor, h, weight, key, False, RULE, SCALARS, CODECS, DTYPES, PER_ITEM, FIRST,
                AVERAGED, COMPUTE, RANDOM, CONVERT, BLOCK, BLOCK_SIZE, ALIGNED,
            )  # fmt: skip
