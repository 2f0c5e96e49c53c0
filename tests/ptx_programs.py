"""PTX programs of a few lines, run by the machine of these tests."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from ptx_machine.global_memory import GlobalMemory, Span
from ptx_machine.machine import Machine
from ptx_machine.parse import parse

U32 = np.uint32
THREADS = 64


def program(body: str) -> str:
    """A kernel whose %rd0 is the address it is given, %r0 the thread, and %rd1 that of the thread's 4 bytes."""
    return f""".version 8.0
.target sm_90
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
.reqntid {THREADS}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<19>;
	.reg .b64 %rd<19>;
	ld.param.b64 %rd0, [k_param_0];
	mov.u32 %r0, %tid.x;
	mad.wide.s32 %rd1, %r0, 4, %rd0;
{body}
	ret;
}}
"""


def run(
    body: str, out: np.ndarray, shared: int = 0, programs: int = 1, spans: Iterable[Span] = (), poison: int = 0xA5
) -> Machine:
    spans = spans or [Span(out.ctypes.data, out.ctypes.data + out.nbytes, "out")]
    machine = Machine(parse(program(body)), programs, [out.ctypes.data], GlobalMemory(spans), shared, poison=poison)
    machine.run()
    return machine


def faults(*given: object, **options: object) -> list[str]:
    """The kinds."""
    return [fault.kind for fault in run(*given, **options).faults]  # type: ignore[arg-type]


# Threads.

LANES = np.arange(THREADS)
STORE = "st.global.b32 [%rd1], %r1;"


def stored(body: str, shared: int = 0) -> np.ndarray:
    """What each thread leaves in %r1."""
    out = np.full(THREADS, 0xDEAD, U32)
    assert not faults(f"{body}\n{STORE}", out, shared=shared)
    return out
