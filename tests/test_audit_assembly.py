"""How the audit reads what was compiled: control flow, widths of accesses, and offsets that wrap."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed, and there is nothing else to audit", allow_module_level=True)

from triton_optim.audit.assembly import amdgcn_blocks, full_chunk_branch, sass_blocks
from triton_optim.audit.compiling import wrapping_offsets


@pytest.mark.parametrize(
    ("offset", "wraps"),
    [
        ("%b = arith.extsi %a : i32 to i64\n%c = arith.muli %b, %k : i64", False),
        ("%b = arith.muli %a, %k : i32\n%c = arith.extsi %b : i32 to i64", True),
        ("%b = arith.muli %a, %k : i32\n%c = tt.splat %b : i32 -> tensor<8xi32>", True),
        ("%c = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32>", False),
    ],
)
def test_offsets_that_wrap_are_seen_in_the_ir(offset: str, wraps: bool) -> None:
    lines = ["%a = tt.load %chunks : !tt.ptr<i32>", *offset.split("\n"), "%p = tt.int_to_ptr %x : i64 -> !tt.ptr<f32>"]
    ttir = "\n".join(["tt.func @f(%chunks: !tt.ptr<i32>) {", *lines, "%q = tt.addptr %p, %c : !tt.ptr<f32>, i64"])
    assert wrapping_offsets(ttir) == (["%c"] if wraps else [])


SASS = """
        /*0000*/                   LDG.E.64 R10, desc[UR14][R2.64] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   LDG.E R7, desc[UR14][R2.64] ;
        /*0030*/              @!P0 BRA 0xe0 ;
        /*0040*/                   IADD3 R9, P1, R2, 0x400, RZ ;
        /*0050*/                   ISETP.GT.U32.AND P0, PT, R9, R10, PT ;
        /*0060*/              @!P6 LDG.E R26, desc[UR14][R6.64+0x4] ;
        /*0070*/                   FMUL R26, R26, R31 ;
        /*0080*/                   FMUL R26, R26, R31 ;
        /*0090*/                   FMUL R26, R26, R31 ;
        /*00a0*/                   FMUL R26, R26, R31 ;
        /*00b0*/               @P5 EXIT ;
        /*00c0*/                   STG.E desc[UR14][R6.64], R26 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   LDG.E.128 R12, desc[UR14][R40.64] ;
        /*00f0*/               @P0 BRA P1, 0x110 ;
        /*0100*/                   CALL.REL.NOINC 0x140 ;
        /*0110*/                   FMUL R0, R0, R31 ;
        /*0120*/                   STG.E.U16 desc[UR14][R36.64], R4 ;
        /*0130*/                   EXIT ;
        /*0140*/                   STL [R1], R4 ;
        /*0150*/                   RET.REL.NODEC R18 0x0 ;
"""


def test_the_full_chunk_branch_in_sass() -> None:
    """The tables' loads before the test and the masked side are left out; a slow path that comes back is not."""
    blocks = sass_blocks(SASS)
    branch = full_chunk_branch(blocks)
    assert [(x.opcode, x.loaded, x.stored) for x in branch.accesses] == [("LDG.E.128", 16, 0), ("STG.E.U16", 0, 2)]
    assert [x.opcode for x in branch.instructions] == [
        "LDG.E.128",
        "BRA",
        "CALL.REL.NOINC",
        "FMUL",
        "STG.E.U16",
        "EXIT",
    ]
    assert [x.opcode for block in blocks for x in block.instructions if x.local] == ["STL"]


def test_a_full_chunk_branch_under_a_predicate() -> None:
    """Triton 3.6's ptxas does not branch to a short one."""
    text = """
        /*0000*/                   LDG.E.64 R10, desc[UR14][R2.64] ;
        /*0010*/                   ISETP.GT.AND.EX P0, PT, R5, R13, PT, P0 ;
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR4][R4.64] ;
        /*0030*/                   LDG.E R27, desc[UR4][R24.64+0x4] ;
        /*0040*/              @!P0 FMUL R29, R20.reuse, R4 ;
        /*0050*/              @!P0 STG.E.128 desc[UR4][R18.64], R8 ;
        /*0060*/              @!P0 EXIT ;
        /*0070*/              @!P1 LDG.E R9, desc[UR4][R4.64] ;
        /*0080*/                   FMUL R9, R9, R4 ;
        /*0090*/                   FMUL R9, R9, R4 ;
        /*00a0*/              @!P1 STG.E desc[UR4][R2.64], R9 ;
        /*00b0*/                   EXIT ;
"""
    branch = full_chunk_branch(sass_blocks(text))
    assert [x.opcode for x in branch.instructions] == ["LDG.E.128", "FMUL", "STG.E.128", "EXIT"]
    assert not any(x.guarded for x in branch.accesses)


def test_the_full_chunk_branch_in_amdgcn() -> None:
    """Here the masked side also follows the full one in the text, where a flag skips it."""
    text = """kernel:
\ts_load_dword s0, s[0:1], 0x0 ; a table
\ts_cbranch_scc1 .LBB0_3
; %bb.1:
\ts_cbranch_vccnz .LBB0_2
; %bb.4:
\tbuffer_load_dwordx4 v[6:9], v0, s[0:3], 0 offen
\tbuffer_store_dwordx2 v[6:7], v0, s[0:3], 0 offen
.LBB0_2:                                ; %Flow
\ts_cbranch_scc1 .LBB0_3
; %bb.5:
\tv_cndmask_b32_e32 v36, v1, v0, vcc
\tbuffer_load_dword v0, v36, s[0:3], 0 offen
\tv_mov_b32_e32 v1, v0
\tbuffer_store_dword v1, v36, s[0:3], 0 offen
.LBB0_3:
\ts_endpgm
.Lfunc_end0:
"""
    branch = full_chunk_branch(amdgcn_blocks(text))
    assert [(x.opcode, x.moved) for x in branch.accesses] == [("buffer_load_dwordx4", 16), ("buffer_store_dwordx2", 8)]


def test_a_kernel_without_a_masked_side_is_refused() -> None:
    with pytest.raises(ValueError, match="reads chunks on 0 sides of a test"):
        full_chunk_branch(sass_blocks(SASS.replace("LDG.E.128", "NOP")))


def test_what_both_sides_store_may_be_stored_after_them() -> None:
    text = SASS.replace("@P5 EXIT", "BRA 0x120").replace("LDG.E R26", "LDG.E.U8 R26")
    branch = full_chunk_branch(sass_blocks(text))
    assert [(x.opcode, x.loaded) for x in branch.accesses] == [("LDG.E.128", 16)]


@pytest.mark.parametrize(
    ("opcode", "loaded", "stored", "local"),
    [
        ("buffer_load_dwordx4", 16, 0, False),
        ("buffer_store_short", 0, 2, False),
        ("global_load_ushort", 2, 0, False),
        ("global_load_short_d16_hi", 2, 0, False),
        ("global_store_b128", 0, 16, False),
        ("global_load_d16_b16", 2, 0, False),
        ("scratch_store_dword", 0, 0, True),
    ],
)
def test_the_width_of_an_access_in_amdgcn(opcode: str, loaded: int, stored: int, local: bool) -> None:
    access = amdgcn_blocks(f"kernel:\n\t{opcode} v0\n\ts_endpgm\n")[0].instructions[0]
    assert (access.loaded, access.stored, access.local) == (loaded, stored, local)
