"""Threads in the PTX machine: shuffles, loops, branches, barriers; memory that they share, bounds, and races."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_machine.global_memory import Span
from ptx_programs import LANES, STORE, THREADS, U32, faults, run, stored


def test_shuffles() -> None:
    assert (stored("shfl.sync.bfly.b32 %r1, %r0, 5, 31, -1;") == LANES ^ 5).all()
    assert (stored("mov.b32 %r9, 2;\nshfl.sync.idx.b32 %r1, %r0, %r9, 31, -1;") == LANES // 32 * 32 + 2).all()
    with pytest.raises(NotImplementedError, match="shuffle"):
        stored("shfl.sync.down.b32 %r1, %r0, 3, 31, -1;")


def test_reductions_and_votes() -> None:
    warps = LANES.reshape(2, 32)
    assert (stored("redux.sync.add.s32 %r1, %r0, -1;") == np.repeat(warps.sum(1), 32)).all()
    numbers = "cvt.rn.f32.s32 %r2, %r0;\nneg.f32 %r2, %r2;\nredux.sync.max.f32 %r1, %r2, -1;"
    assert (stored(numbers).view(np.float32) == -np.repeat(warps.min(1), 32)).all()
    third = "setp.lt.u32 %p1, %r0, 35;\nvote.sync.ballot.b32 %r1, %p1, -1;"
    assert (stored(third) == np.repeat([2**32 - 1, 7], 32)).all()


LOOP = """mov.b32 %r1, 0;
	mov.b32 %r2, 0;
$L1:
	setp.ge.s32 %p1, %r2, %r0;
	@%p1 bra $L2;
	add.s32 %r1, %r1, 3;
	add.s32 %r2, %r2, 1;
	bra.uni $L1;
$L2:
"""


def test_a_loop_that_each_thread_leaves_at_its_own_time() -> None:
    assert (stored(LOOP) == 3 * LANES).all()


def test_threads_of_two_branches_meet_again() -> None:
    branches = """and.b32 %r2, %r0, 1;
	setp.eq.b32 %p1, %r2, 0;
	@%p1 bra $L1;
	mov.b32 %r3, 7;
	bra.uni $L2;
$L1:
	mov.b32 %r3, 9;
$L2:
	shfl.sync.bfly.b32 %r1, %r3, 1, 31, -1;"""
    assert (stored(branches) == np.where(LANES % 2, 9, 7)).all()


def test_a_shuffle_waits_for_threads_that_come_later() -> None:
    """Every fourth thread goes a way that lies behind the loop."""
    slow = """mov.b32 %r1, %r0;
	mov.b32 %r2, 0;
$L1:
	shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;
	and.b32 %r3, %r0, 3;
	setp.eq.b32 %p1, %r3, 3;
	@%p1 bra $L3;
$L2:
	add.s32 %r2, %r2, 1;
	setp.lt.s32 %p2, %r2, 4;
	@%p2 bra $L1;
	bra.uni $L4;
$L3:
	add.s32 %r1, %r1, 100;
	bra.uni $L2;
$L4:"""
    value = LANES
    for _ in range(4):
        value = value[LANES ^ 1] + np.where(LANES % 4 == 3, 100, 0)
    assert (stored(slow) == value).all()


def test_a_barrier_waits_for_the_slower_warp() -> None:
    warps = """shl.b32 %r5, %r0, 2;
	xor.b32 %r6, %r5, 128;
	mov.b32 %r1, %r0;
	mov.b32 %r2, 0;
$L1:
	st.shared.b32 [%r5], %r1;
	bar.sync 0;
	ld.shared.b32 %r1, [%r6];
	setp.gt.s32 %p1, %r0, 31;
	@%p1 bra $L3;
$L2:
	bar.sync 0;
	add.s32 %r2, %r2, 1;
	setp.lt.s32 %p2, %r2, 3;
	@%p2 bra $L1;
	bra.uni $L4;
$L3:
	add.s32 %r1, %r1, 1000;
	bra.uni $L2;
$L4:"""
    value = LANES
    for _ in range(3):
        value = value[LANES ^ 32] + np.where(LANES > 31, 1000, 0)
    assert (stored(warps, shared=256) == value).all()


TURNED = """xor.b32 %r2, %r0, 63;
	shl.b32 %r2, %r2, 2;
	shl.b32 %r3, %r0, 2;
	st.shared.b32 [%r3], %r0;
	{}
	ld.shared.b32 %r1, [%r2];"""


def test_shared_memory() -> None:
    assert (stored(TURNED.format("bar.sync 0;"), shared=256) == 63 - LANES).all()
    out = np.zeros(THREADS, U32)
    assert faults(TURNED.format("") + STORE, out, shared=256) == ["race"]
    assert faults(TURNED.format("bar.sync 0;") + STORE, out, shared=252) == ["out of bounds"] * 2
    assert faults("st.shared.b32 [%r0], %r0;", out, shared=256)[0] == "misaligned"
    twice = "shl.b32 %r3, %r0, 2;\nxor.b32 %r4, %r3, 128;\nst.shared.b32 [%r3], %r0;\nst.shared.b32 [%r4], %r0;"
    assert faults(twice, out, shared=256) == ["race"], "two warps store at one address"


def test_matrices_of_shared_memory() -> None:
    rows = """shl.b32 %r2, %r0, 1;
	cvt.u16.u32 %rs1, %r0;
	st.shared.b16 [%r2], %rs1;
	bar.sync 0;
	and.b32 %r3, %r0, 7;
	shl.b32 %r3, %r3, 4;
	ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r3];"""
    assert (stored(rows, shared=256).view(np.uint16)[:THREADS] == LANES).all()


# Global memory.


def test_accesses_of_vectors() -> None:
    out = np.arange(4 * THREADS, dtype=U32)
    moved = """mul.wide.u32 %rd2, %r0, 16;
	add.s64 %rd2, %rd2, %rd0;
	ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];
	st.global.v2.b32 [%rd2+8], {%r1, %r2};"""
    assert not faults(moved, out)
    expected = np.arange(4 * THREADS).reshape(-1, 4)
    expected[:, 2:] = expected[:, :2]
    assert (out.reshape(-1, 4) == expected).all()


@pytest.mark.parametrize("store", [False, True])
def test_bounds_and_alignment(store: bool) -> None:
    out = np.zeros(THREADS + 16, U32)
    start = out.ctypes.data
    exactly = [Span(start, start + 4 * THREADS, "out")]
    one = "st.global.b32 [%rd1+{0}], %r0;" if store else "ld.global.b32 %r1, [%rd1+{0}];"
    two = "st.global.v2.b32 [%rd1], {%r0, %r0};" if store else "ld.global.v2.b32 {%r1, %r2}, [%rd1];"
    assert not faults(one.format(0), out, spans=exactly)
    machine = run(one.format(4), out, spans=exactly)
    assert [(fault.kind, fault.threads) for fault in machine.faults] == [("out of bounds", 1)]
    assert "0 bytes after the end of out of 256 bytes, in program 0, thread 63" in str(machine.faults[0])
    assert faults(one.format(-4), out, spans=exactly) == ["out of bounds"]
    assert "misaligned" in faults(two, out)
    assert (out[THREADS:] == 0).all(), "a store that is out of bounds was made"


def test_a_vector_across_the_end() -> None:
    out = np.zeros(2 * THREADS, U32)
    spans = [Span(out.ctypes.data, out.ctypes.data + 8 * THREADS - 4, "out")]
    body = "mul.wide.u32 %rd2, %r0, 8;\nadd.s64 %rd2, %rd2, %rd0;\nld.global.v2.b32 {%r1, %r2}, [%rd2];"
    (fault,) = run(body, out, spans=spans).faults
    assert (fault.kind, fault.threads) == ("out of bounds", 1)
    assert "across the end of out" in str(fault)


def test_memory_that_is_not_there() -> None:
    out = np.zeros(THREADS, U32)
    far = "mov.b64 %rd2, 35184372088832;\nld.global.b32 %r1, [%rd2];\nst.global.b32 [%rd2+4], %r0;\n" + STORE
    spans = [Span(out.ctypes.data, out.ctypes.data + 4 * THREADS, "out"), Span(1 << 45, (1 << 45) + 8, "far", True)]
    assert faults(far, out, spans=spans) == ["race"]  # all threads store other values at one address
    assert faults(far, out, spans=spans[:1]) == ["out of bounds"] * 2


CROSSED = """st.global.b32 [%rd1], %r0;
	{}
	xor.b32 %r2, %r0, {};
	mad.wide.s32 %rd2, %r2, 4, %rd0;
	ld.global.b32 %r3, [%rd2];"""


@pytest.mark.parametrize(
    ("barrier", "away", "programs", "expected"),
    [("", 1, 1, []), ("", 32, 1, ["race"]), ("bar.sync 0;", 32, 1, []), ("bar.sync 0;", 1, 2, ["race"])],
)
def test_races_of_a_store_and_a_load(barrier: str, away: int, programs: int, expected: list[str]) -> None:
    """Of one warp, of two, of two with a barrier between them, and of two programs."""
    assert faults(CROSSED.format(barrier, away), np.zeros(THREADS, U32), programs=programs) == expected


def test_races_of_stores() -> None:
    out = np.zeros(THREADS, U32)
    assert faults("st.global.b32 [%rd0], %r0;", out) == ["race"]
    assert not faults("mov.b32 %r1, 7;\nst.global.b32 [%rd0], %r1;", out), "all store the same"
    later = "xor.b32 %r2, %r0, 32;\nmad.wide.s32 %rd2, %r2, 4, %rd0;\nld.global.b32 %r3, [%rd2];\n{}" + STORE
    assert faults("mov.b32 %r1, %r0;\n" + later.format(""), out) == ["race"]
    assert not faults("mov.b32 %r1, %r0;\n" + later.format("bar.sync 0;\n"), out)


@pytest.mark.parametrize(
    ("kind", "instruction"), [("barrier", "bar.sync 0;"), ("shuffle", "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;")]
)
def test_threads_that_are_missing_where_all_wait(kind: str, instruction: str) -> None:
    some = f"setp.lt.s32 %p1, %r0, 40;\n@%p1 bra $L1;\n{instruction}\n$L1:\n"
    assert faults(some, np.zeros(THREADS, U32)) == [kind]


def test_reads_of_what_nobody_wrote() -> None:
    out = np.zeros(THREADS, U32)
    for written in ("", "setp.lt.s32 %p1, %r0, 9;\n@%p1 mov.b32 %r7, 1;\n"):  # by none, and by some
        assert run(written + "st.global.b32 [%rd1], %r7;", out).unwritten == ["%r7 in st.global.b32 [%rd1], %r7"]
    assert run("ld.shared.b32 %r1, [global_smem];\n" + STORE, out, shared=16).unwritten
    run("st.global.b32 [%rd1], %r7;", out, poison=0x5A)
    assert (out == 0x5A5A5A5A).all()


def test_stores_can_be_undone() -> None:
    out = np.arange(THREADS, dtype=U32)
    machine = run("mov.b32 %r1, 7;\n" + STORE + STORE.replace("%r1", "%r0"), out)
    out[:] = 99
    machine.memory.undo()
    assert (out == LANES).all()
