"""What a compilation may come to, and what is wrong with one."""

from __future__ import annotations

from typing import NamedTuple

import triton

from .cases import DTYPES, TARGETS
from .measure import Measurement


class Bound(NamedTuple):
    """What a compilation may come to: registers a thread at most, bits an access of the full-chunk branch at least."""

    registers: int = 64
    narrowest_bits: int = 128


# The release of Triton, and so of the compilers that come with it, of which the bounds on registers are. Others share
# them out in another way: of adamw_amsgrad in fp32 int8 on sm_90, 3.8 makes 156 and 3.9 at most 104.
RELEASE = "3.9"
MOST = 255  # registers a thread can have

# What misses the bounds of all other cases, by backend and dtypes.
BOUNDS = {
    # Each thread has 4 elements: one access of 128 bits a float32 role, and of 64 a bfloat16 role. With 8 elements, all
    # would be of 128, but the float32 stores would go through shared memory, in up to 88 registers.
    ("cuda", "bf16+fp32"): Bound(narrowest_bits=64),
    ("hip", "bf16+fp32"): Bound(narrowest_bits=64),
    # Rules of two means and a root take up to 77 at 8 elements a thread. 80 leave 24 warps an SM, which keep 60 KB of
    # loads in flight; memory needs 26 KB (4.3 TB/s for 0.8 us over 132 SMs).
    ("cuda", "bf16"): Bound(registers=80),
    ("cuda", "fp16"): Bound(registers=80),
    # The bits of 8 elements are in flight with them: up to 106 for ademamix. 112 leave 16 warps an SM, 40 KB of loads.
    ("cuda", "bf16 stochastic"): Bound(registers=112),
    ("hip", "bf16 stochastic"): Bound(registers=88),
    # 8 elements a thread: bytes beside them come 64 bits at a time, and half bytes 32.
    ("cuda", "bf16 kahan"): Bound(registers=104),
    ("cuda", "bf16 split24"): Bound(registers=104, narrowest_bits=64),
    ("cuda", "bf16 split32"): Bound(registers=104, narrowest_bits=64),
    ("cuda", "bf16 master"): Bound(narrowest_bits=64),
    # Up to 123 for amsgrad; 128 leave 16 warps an SM, as 104 do.
    ("cuda", "bf16 int8"): Bound(registers=128, narrowest_bits=64),
    ("cuda", "bf16 int4"): Bound(registers=128, narrowest_bits=32),
    ("cuda", "fp32 int8"): Bound(registers=104, narrowest_bits=64),
    # 88 leave 5 of 8 waves, 104 leave 4. amsgrad takes up to 81 and 98.
    ("hip", "bf16 kahan"): Bound(registers=88),
    ("hip", "bf16 split24"): Bound(registers=88, narrowest_bits=64),
    ("hip", "bf16 split32"): Bound(registers=88, narrowest_bits=64),
    ("hip", "bf16 master"): Bound(narrowest_bits=64),
    ("hip", "bf16 int8"): Bound(registers=104, narrowest_bits=64),
    ("hip", "bf16 int4"): Bound(registers=104, narrowest_bits=32),
    ("hip", "fp32 int8"): Bound(registers=104, narrowest_bits=64),
    # Triton 3.6 takes 66 for amsgrad, 3.9 65 for nadam; up to 72 leave 7 of 8 waves.
    ("hip", "bf16"): Bound(registers=72),
    ("hip", "fp16"): Bound(registers=72),
}


def bound_of(m: Measurement) -> Bound:
    """What `m` may come to. Misaligned accesses are as narrow as an element."""
    bound = BOUNDS.get((TARGETS[m.arch].backend, m.dtypes), Bound())
    # The bounds are of rules with three states at most, beside p and g. Of more, those of each are in flight, too.
    states = len(m.roles) - 2 - (DTYPES[m.dtypes].whole and not m.sums)
    bound = bound._replace(registers=bound.registers * max(states, 3) // 3)
    if not triton.__version__.startswith(f"{RELEASE}."):
        bound = bound._replace(registers=MOST)
    return (
        bound if m.aligned else bound._replace(narrowest_bits=8 * min(dtype.itemsize for dtype in DTYPES[m.dtypes][:3]))
    )


def problems(m: Measurement) -> list[str]:
    """What is wrong with `m`, in a phrase each."""
    registers, bits = bound_of(m)
    good = {
        f"{m.spills} spills, {m.stack_bytes} bytes of stack": m.spills == m.stack_bytes == 0,
        f"{m.registers} registers, over {registers}": m.registers <= registers,
        f"accesses of {m.narrowest_bits} bits, under {bits}": m.narrowest_bits >= bits,
        f"accesses of {m.widest_bits} bits to misaligned elements of {bits}": m.aligned or m.widest_bits <= bits,
        f"{m.masked_accesses} masked accesses in the full-chunk branch": m.masked_accesses == 0,
        f"{m.loaded:g} bytes an element loaded for a floor of {m.floor_loaded}": m.loaded == m.floor_loaded,
        f"{m.stored:g} bytes an element stored for a floor of {m.floor_stored}": m.stored == m.floor_stored,
        f"offsets of 32 bits: {', '.join(m.wrapping_offsets)}": not m.wrapping_offsets,
        "contraction to fused multiply-adds left to Triton's default": m.fp_fusion is not None,
    }
    return [problem for problem, passed in good.items() if not passed]
