"""What every rule compiles to on every GPU: run as a user runs it, without a GPU and outside this process."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_optim

if find_spec("triton") is None:
    pytest.skip("Triton is not installed, and there is nothing else to audit", allow_module_level=True)

from triton_optim.kernels import multi_tensor

from triton_optim import audit, triton_backend, triton_launch
from triton_optim.audit_assembly import amdgcn_blocks, full_chunk_branch, sass_blocks
from triton_optim.audit_compile import wrapping_offsets
from triton_optim.cli import audit as command

ELEMENT_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "fp64": 64}
OF_EVERY_RULE = {"fp32", "bf16", "bf16 stochastic"}
# What is made beside a rule is so for every one alike: four stand for all.
OF_STATES = {"bf16 int8", "bf16 int4", "fp32 int8"}
CODED = {"bf16 kahan", "bf16 split24", "bf16 split32", "bf16 master"} | OF_STATES
OF_FOUR = CODED | {"fp16", "fp64", "bf16+fp32", "fp32 whole"}
FOUR = ("adamw", "adamw_amsgrad", "lion", "sgd")
Row = dict[str, Any]


def compiling() -> dict[str, str]:
    """The environment of a process that compiles kernels; this one may interpret them."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """All that the command measures."""
    path = tmp_path_factory.mktemp("audit") / "audit.json"
    words = [sys.executable, "-m", "triton_optim", "audit", "--json", str(path)]
    finished = subprocess.run(words, env=compiling(), capture_output=True, text=True, timeout=1500, check=False)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-6000:]
    assert max(map(len, finished.stdout.replace(str(path), "").splitlines())) <= 120
    record = json.loads(path.read_text())
    assert record["versions"].keys() == {"torch", "triton", "python"}
    return list(record["cases"])


@pytest.fixture(scope="module")
def aligned(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["aligned"]]


def failing(rows: list[Row], good: Callable[[Row], bool], *fields: str) -> list[tuple[Any, ...]]:
    """The rows that are not good: which they are, and the fields that say why."""
    return [tuple(row[f] for f in ("rule", "dtypes", "arch", *fields)) for row in rows if not good(row)]


def test_every_rule_dtype_and_architecture_is_there(rows: list[Row]) -> None:
    rules = {row["rule"] for row in rows}
    assert rules >= {"adam", "adam_amsgrad", "adamw", "adamw_amsgrad", "sgd", "sgd_momentum", "sgd_nesterov", "lion"}
    optimizers = {
        name
        for name in triton_optim.__all__
        if getattr(getattr(triton_optim, name), "variants", ()) and name != "RuleOptimizer"
    }
    assert {name for row in rows for name in row["optimizers"]} == optimizers
    expected = {
        (rule, dtypes, arch)
        for rule in rules
        for dtypes in OF_EVERY_RULE | (OF_FOUR if rule in FOUR else set())
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
        # without states, another set's
        if dtypes not in OF_STATES | {"bf16+fp32"} or rule not in ("adafactor", "muon", "sgd")
    }
    assert {(row["rule"], row["dtypes"], row["arch"]) for row in rows if row["aligned"]} == expected
    misaligned = {(row["rule"], row["arch"]) for row in rows if not row["aligned"]}
    assert misaligned == {(r, a) for r, _, a in expected if r in FOUR}


def test_nothing_spills(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: row["spills"] == row["stack_bytes"] == 0, "spills", "stack_bytes")


def test_registers(rows: list[Row]) -> None:
    """64 leave an SM 1,024 threads; 72 leave 7 of 8 waves on gfx942; `audit.BOUNDS` has the reasons for more."""

    def bound(row: Row) -> int:
        if row["dtypes"] in CODED | {"bf16 stochastic"}:
            return 104
        if row["arch"] == "gfx942":
            return 72
        return 80 if row["rule"].startswith("rmsprop_centered") and row["dtypes"] in ("bf16", "fp16") else 64

    assert not failing(rows, lambda row: row["registers"] <= bound(row), "registers")
    assert not failing(rows, lambda row: row["registers"] <= row["bounds"]["registers"], "registers")


def test_accesses_of_full_chunks_are_128_bits(aligned: list[Row]) -> None:
    """Those to the widest part; of narrower ones, as many elements."""
    narrowest = {"bf16+fp32": 64, "bf16 split24": 64, "bf16 split32": 64, "bf16 master": 64}
    narrowest |= {"bf16 int8": 64, "fp32 int8": 64, "bf16 int4": 32}
    assert not failing(aligned, lambda row: row["widest_bits"] == 128, "widest_bits")
    assert not failing(aligned, lambda row: row["narrowest_bits"] == narrowest.get(row["dtypes"], 128))
    assert not failing(aligned, lambda row: row["masked_accesses"] == 0, "masked_accesses")


def test_nothing_goes_through_shared_memory(rows: list[Row]) -> None:
    """But what lies otherwise in the threads than in memory: codes, and parts of different widths."""
    others = CODED - {"bf16 kahan"}
    assert not failing(rows, lambda row: row["shared_bytes"] == 0 or row["dtypes"] in others, "shared_bytes")
    coded = [row for row in rows if row["dtypes"] in ("bf16 int8", "bf16 int4")]
    assert not failing(coded, lambda row: row["shared_bytes"] <= 32, "shared_bytes")  # the maxima of warps


PARTS = {  # bytes an element beside the parameter, of what a state is kept in, and whether the parameter is read
    "bf16 kahan": (2, 2, True),
    "bf16 split24": (1, 2, True),
    "bf16 split32": (2, 2, True),
    "bf16 master": (4, 2, False),
    "bf16 int8": (0, 1 + 4 / 256, True),
    "bf16 int4": (0, 1 / 2 + 2 / 64, True),
    "fp32 int8": (0, 1 + 4 / 256, True),
}


def test_bytes_an_element_are_the_floor(rows: list[Row]) -> None:
    def floor(row: Row) -> tuple[float, float]:
        if row["dtypes"] in PARTS:
            beside, state, read = PARTS[row["dtypes"]]
            own, states = ELEMENT_BITS[row["dtypes"][:4]] // 8, len(row["roles"]) - 2
            return own * (1 + read) + beside + state * states, own + beside + state * states
        sizes = {role: ELEMENT_BITS[dtype] // 8 for role, dtype in row["roles"].items()}
        return sum(sizes.values()), sum(size for role, size in sizes.items() if role != "g")

    assert not failing(rows, lambda row: (row["loaded"], row["stored"]) == floor(row), "loaded", "stored")
    adamw = [row for row in rows if row["rule"] == "adamw" and row["aligned"]]
    expected = {"fp32": 28, "bf16": 14, "bf16 split32": 18, "bf16 int8": 10.0625, "bf16 int4": 8.125}
    for dtypes, moved in expected.items():
        assert [row["loaded"] + row["stored"] for row in adamw if row["dtypes"] == dtypes] == [moved] * 4


def test_trap_1_offsets_are_int64(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: not row["wrapping_offsets"], "wrapping_offsets")


def test_trap_4_misaligned_accesses_are_an_element_wide(rows: list[Row]) -> None:
    misaligned = [row for row in rows if not row["aligned"]]
    assert misaligned
    assert not failing(misaligned, lambda row: row["widest_bits"] <= ELEMENT_BITS[row["dtypes"]], "widest_bits")


def test_trap_11_divisions_and_roots_are_as_exact_as_chosen(rows: list[Row]) -> None:
    """Within 2 ulp in float32, see kernels/language.py; correctly rounded in float64."""
    for row in rows:
        double = row["dtypes"] == "fp64"
        allowed = {"div.rn.f64", "sqrt.rn.f64"} if double else {"div.full.f32", "sqrt.approx.ftz.f32"}
        assert set(row["ptx_functions"]) <= allowed, (row["rule"], row["dtypes"])
    assert {f for row in rows if row["rule"] == "adamw" for f in row["ptx_functions"]} > {"div.full.f32", "div.rn.f64"}


def test_trap_13_fusion_of_multiply_and_add_is_set(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: row["fp_fusion"] is True, "fp_fusion")


def test_the_audit_finds_no_problem(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: row["problems"] == [], "problems")


def test_the_backend_launches_what_is_audited(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(triton_backend, "launch", lambda *given: launched.append(given[-1]))
    p = torch.zeros(8, device=device, requires_grad=True)
    p.grad = torch.ones_like(p)
    triton_optim.AdamW([p], backend="triton").step()
    expected = multi_tensor.launch_options([4] * 4, 0, triton_launch.warp_size(device))
    assert launched[0].items() >= expected.items()
    assert expected["enable_fp_fusion"] is True


# Each is one edit of the kernel, and what the audit must say of it.
MUTATIONS = {
    "nothing": ("BLOCK = 1024", "BLOCK = 1024", None),
    "32-bit chunk offset": (".to(tl.int64) * BLOCK", " * BLOCK", "offsets of 32 bits"),
    "offset widened too late": (
        "tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK",
        "(tl.load(chunks + 2 * program + 1) * BLOCK).to(tl.int64)",
        "offsets of 32 bits",
    ),
    "no alignment hint": ("tl.multiple_of(pointer, 16)", "pointer", "accesses of 32 bits, under 128"),
    "g written back": (
        "        if i != 1:\n            if i == STATES:",
        "        if True:\n            if i == STATES:",
        "16 bytes an element stored for a floor of 12",
    ),
    "too few threads": ("BLOCK * widest // (16 * warp_size)", "1", "registers, over 64"),
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the audit says of each mutation, and of misaligned accesses taken for aligned ones, for Adam on an H100."""
    folder = tmp_path_factory.mktemp("mutations")
    source = Path(inspect.getsourcefile(multi_tensor) or "").read_text()
    for name, (old, new, _) in MUTATIONS.items():
        assert source.count(old) == 1, f"the kernel no longer has what the mutation {name!r} changes"
        (folder / f"{name}.py").write_text(source.replace(old, new))
    script = """
        import dataclasses, json, pathlib, sys
        from importlib.util import module_from_spec, spec_from_file_location
        from triton_optim import audit

        adam = next(rule for rule in audit.every_rule() if rule.name == "adam")
        found = {}
        for path in pathlib.Path(sys.argv[1]).glob("*.py"):
            spec = spec_from_file_location("triton_optim.kernels.mutated", path)
            kernel = module_from_spec(spec)
            spec.loader.exec_module(kernel)
            found[path.stem] = audit.problems(audit.measure(adam, "fp32", "sm_90", kernel=kernel))
        misaligned = audit.measure(adam, "fp32", "sm_90", aligned=False)
        found["misaligned"] = audit.problems(misaligned)
        found["misaligned for aligned"] = audit.problems(dataclasses.replace(misaligned, aligned=True))
        print(json.dumps(found))
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    finished = subprocess.run(words, env=compiling(), capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_audit_catches_a_mutation(findings: dict[str, list[str]], mutation: str) -> None:
    expected = MUTATIONS[mutation][2]
    assert bool(findings[mutation]) == (expected is not None), findings[mutation]
    assert expected is None or any(expected in problem for problem in findings[mutation]), findings[mutation]


def test_the_audit_catches_a_lost_alignment(findings: dict[str, list[str]]) -> None:
    assert findings["misaligned"] == []
    assert findings["misaligned for aligned"] == ["accesses of 32 bits, under 128"]


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
        /*0030*/              @!P0 BRA `(.L_x_0) ;
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
.L_x_0:
        /*00e0*/                   LDG.E.128 R12, desc[UR14][R40.64] ;
        /*00f0*/               @P0 BRA P1, `(.L_x_1) ;
        /*0100*/                   CALL.REL.NOINC `($slow) ;
.L_x_1:
        /*0110*/                   FMUL R0, R0, R31 ;
        /*0120*/                   STG.E.U16 desc[UR14][R36.64], R4 ;
        /*0130*/                   EXIT ;
$slow:
        /*0140*/                   STL [R1], R4 ;
        /*0150*/                   RET.REL.NODEC R18 `(kernel) ;
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
    one_side = SASS.replace("STG.E desc", "NOP desc")
    with pytest.raises(ValueError, match="stores lie on 0 sides of a test"):
        full_chunk_branch(sass_blocks(one_side.replace("STG.E.U16", "NOP")))
    with pytest.raises(ValueError, match="stores lie on 1 sides of a test"):
        full_chunk_branch(sass_blocks(one_side))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adm"}, "--rule adm: the audit knows no 'adm'. Choose from "),
        ({"arch": "sm_90,sm90"}, "--arch sm_90,sm90: the audit knows no 'sm90'. Choose from sm_80, "),
        ({"json": Path("/nowhere/a.json")}, "--json /nowhere/a.json: the folder /nowhere does not exist. Create it"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"rule": None, "arch": None, "json": None} | options
    assert command.run(argparse.Namespace(**given)) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="a GPU is here, so this process compiles its kernels")
def test_under_the_interpreter_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(argparse.Namespace(rule=None, arch=None, json=None)) == 1
    message = capsys.readouterr().err
    assert message.startswith("TRITON_INTERPRET=1 puts an interpreter in the place of Triton's compiler")
    assert "env -u TRITON_INTERPRET" in message


def test_stateless_rules_have_no_states_in_their_dtypes() -> None:
    sgd = next(rule for rule in audit.every_rule() if not rule.state_names)
    (codec,) = audit.role_codecs(sgd, "bf16+fp32")
    assert codec.dtypes == (torch.bfloat16,)
