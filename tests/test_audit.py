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

import costs
import pytest
import torch
from launches import replace_launches

import triton_optim

if find_spec("triton") is None:
    pytest.skip("Triton is not installed, and there is nothing else to audit", allow_module_level=True)

import triton

from triton_optim.audit import bounds as audit_bounds
from triton_optim.audit import cases as audited
from triton_optim.backends.triton import launch as triton_launch
from triton_optim.cli import audit as command
from triton_optim.kernels import measure, multi_tensor
from triton_optim.registry import rule_optimizers

ELEMENT_BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "fp64": 64}
OF_STATES = {"bf16 int8", "bf16 int4", "fp32 int8"}
CODED = {"bf16 kahan", "bf16 split24", "bf16 split32", "bf16 master"} | OF_STATES
ALL = CODED | {"fp32", "bf16", "bf16 stochastic", "fp16", "fp64", "bf16+fp32", "fp32 whole"}
Row = dict[str, Any]


def compiling() -> dict[str, str]:
    """The environment of a process that compiles kernels; this one may interpret them."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """All that the command measures where it is to be quick."""
    path = tmp_path_factory.mktemp("audit") / "audit.json"
    words = [sys.executable, "-m", "triton_optim", "audit", "--quick", "--json", str(path)]
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
    optimizers = {cls.__name__ for cls in rule_optimizers().values()}
    assert {name for row in rows for name in row["optimizers"]} == optimizers
    # What is made beside a rule is so for every one alike: two stand for all, and one sum for all sums.
    nvidia, two = {"sm_80", "sm_90", "sm_100"}, {"sm_90", "gfx942"}
    expected = {(rule, "fp32", arch) for rule in rules for arch in two}
    expected |= {("adamw", dtypes, arch) for dtypes in ALL for arch in nvidia - two}
    expected |= {("adamw_amsgrad", dtypes, arch) for dtypes in ALL for arch in two}
    expected |= {("lamb_norms", dtypes, "sm_90") for dtypes in ALL - {"fp32 whole"}}
    in_every_way = {(rule, arch) for rule, dtypes, arch in expected if dtypes == "fp64"}
    found = {(row["rule"], row["dtypes"], row["arch"]) for row in rows if row["aligned"]}
    # Of those with as many states, one more closely.
    closely = {rule for rule, _, arch in found if arch == "sm_80"} - {"adamw"}
    states = {rule.name: len(rule.states) for rule in audited.every_rule() if not rule.sums}
    assert sorted(states[rule] for rule in closely) == sorted(set(states.values()))
    expected |= {(rule, "bf16 stochastic", "sm_90") for rule, count in states.items() if count > 2 or rule in closely}
    expected |= {(rule, "fp32", arch) for rule in closely for arch in nvidia}
    expected |= {(rule, *more) for rule in closely for more in (("bf16", "sm_90"), ("bf16 stochastic", "gfx942"))}
    assert found == expected
    assert {(row["rule"], row["arch"]) for row in rows if not row["aligned"]} == in_every_way


def test_the_command_compiles_more_than_the_tests() -> None:
    quick, every = set(audited.every_case(quick=True)), set(audited.every_case())
    assert quick < every
    rules = [rule.name for rule in audited.every_rule()]
    more = {(rule, dtypes, arch) for rule in rules for dtypes, archs in audited.OF_EVERY_RULE.items() for arch in archs}
    assert {case[:3] for case in every} >= more


def test_a_rule_that_is_named_is_compiled_in_every_way() -> None:
    cases = audited.every_case(["sgd"])
    assert {(case.dtypes, case.arch) for case in cases if case.aligned} == {
        (dtypes, arch) for dtypes in ALL - OF_STATES - {"bf16+fp32"} for arch in audited.TARGETS
    }  # without states, some sets are others
    assert {case.arch for case in cases if not case.aligned} == set(audited.TARGETS)


def test_nothing_spills(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: row["spills"] == row["stack_bytes"] == 0, "spills", "stack_bytes")


@pytest.mark.skipif(
    not triton.__version__.startswith(f"{audit_bounds.RELEASE}."),
    reason=f"registers are bounded as Triton {audit_bounds.RELEASE} shares them out",
)
def test_registers(rows: list[Row]) -> None:
    """64 leave an SM 1,024 threads; 72 leave 7 of 8 waves on gfx942; `audit.BOUNDS` has the reasons for more."""

    def bound(row: Row) -> int:
        if row["dtypes"] in CODED | {"bf16 stochastic"}:
            of_three_states = {
                ("adamw_amsgrad", "bf16 int8"): 128,
                ("adamw_amsgrad", "bf16 int4"): 128,
                ("ademamix", "bf16 stochastic"): 112,
            }
            return of_three_states.get((row["rule"], row["dtypes"]), 104)
        if row["arch"] == "gfx942":
            return 72
        return 80 if row["dtypes"] in ("bf16", "fp16") else 64

    def shares(row: Row) -> float:
        """A rule of more than three states has their values in flight, too."""
        return max(len(row["roles"]) - 2 - (row["dtypes"] == "fp32 whole" and not row["sums"]), 3) / 3

    assert not failing(rows, lambda row: row["registers"] <= bound(row) * shares(row), "registers")
    assert not failing(rows, lambda row: row["registers"] <= row["bounds"]["registers"], "registers")


def test_accesses_of_full_chunks_are_128_bits(aligned: list[Row]) -> None:
    """Those to the widest part; of narrower ones, as many elements."""
    narrowest = {"bf16+fp32": 64, "bf16 split24": 64, "bf16 split32": 64, "bf16 master": 64}
    narrowest |= {"bf16 int8": 64, "fp32 int8": 64, "bf16 int4": 32}
    assert not failing(aligned, lambda row: row["widest_bits"] == 128, "widest_bits")
    assert not failing(aligned, lambda row: row["narrowest_bits"] == narrowest.get(row["dtypes"], 128))
    assert not failing(aligned, lambda row: row["masked_accesses"] == 0, "masked_accesses")


def test_nothing_goes_through_shared_memory(rows: list[Row]) -> None:
    """But sums of warps, and what lies otherwise in the threads than in memory: codes, parts of different widths."""
    others = CODED - {"bf16 kahan"}
    most = {True: 128, False: 0}
    assert not failing(
        rows, lambda row: row["shared_bytes"] <= most[row["sums"]] or row["dtypes"] in others, "shared_bytes"
    )
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


# Bytes an element that are read to be summed, of float32.
READ_FOR_SUMS = {"lamb_norms": 16, "novograd_norm": 4, "stable_adamw_ratio": 8, "prodigy_sums": 16}


def test_bytes_an_element_are_the_floor(rows: list[Row]) -> None:
    def floor(row: Row) -> tuple[float, float]:
        roles = row["roles"]
        if row["dtypes"] in PARTS:
            beside, state, read = PARTS[row["dtypes"]]
            own = ELEMENT_BITS[row["dtypes"][:4]] // 8
            sizes = dict.fromkeys(roles, (state, state)) | {"p": (own * read + beside, own + beside), "g": (own, 0)}
        else:
            sizes = {role: (ELEMENT_BITS[dtype] // 8,) * 2 for role, dtype in roles.items()}
            sizes |= {"g": (sizes["g"][0], 0)}
        loaded, stored = (sum(sizes[role][i] for role in roles) for i in range(2))
        return loaded, 0 if row["sums"] else stored

    assert not failing(rows, lambda row: (row["loaded"], row["stored"]) == floor(row), "loaded", "stored")
    summed = {row["rule"]: row["loaded"] for row in rows if row["sums"] and row["dtypes"] == "fp32"}
    assert summed.items() >= READ_FOR_SUMS.items()
    adamw = [row for row in rows if row["rule"] == "adamw" and row["aligned"]]
    expected = {"fp32": 28, "bf16": 14, "bf16 split32": 18, "bf16 int8": 10.0625, "bf16 int4": 8.125}
    for dtypes, moved in expected.items():
        assert {row["loaded"] + row["stored"] for row in adamw if row["dtypes"] == dtypes} == {moved}


def test_offsets_are_int64(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: not row["wrapping_offsets"], "wrapping_offsets")


def test_misaligned_accesses_are_an_element_wide(rows: list[Row]) -> None:
    misaligned = [row for row in rows if not row["aligned"]]
    assert misaligned
    assert not failing(misaligned, lambda row: row["widest_bits"] <= ELEMENT_BITS[row["dtypes"]], "widest_bits")


def test_divisions_and_roots_are_as_exact_as_chosen(rows: list[Row]) -> None:
    """Roots are correctly rounded, and quotients in float64; quotients in float32 are within 2 ulp."""
    for row in rows:
        double = row["dtypes"] == "fp64"
        allowed = {"div.rn.f64", "sqrt.rn.f64"} if double else {"div.full.f32", "sqrt.rn.f32"}
        assert set(row["ptx_functions"]) <= allowed, (row["rule"], row["dtypes"])
    assert {f for row in rows if row["rule"] == "adamw" for f in row["ptx_functions"]} > {"div.full.f32", "div.rn.f64"}


def test_fusion_of_multiply_and_add_is_set(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: row["fp_fusion"] is True, "fp_fusion")


def test_the_audit_finds_no_problem(rows: list[Row]) -> None:
    assert not failing(rows, lambda row: row["problems"] == [], "problems")


COSTS = ("registers", "spills", "shared_bytes", "loaded", "stored", "narrowest_bits", "widest_bits", "instructions")


def test_costs_are_the_committed_ones(rows: list[Row], write_costs: bool) -> None:
    def name(row: Row) -> str:
        return ", ".join((row["rule"], row["dtypes"] + (" misaligned" if not row["aligned"] else ""), row["arch"]))

    costs.compare("kernels", {name(row): {f: row[f] for f in COSTS} for row in rows}, write_costs, triton.__version__)


def test_the_backend_launches_what_is_audited(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    launched: list[dict[str, Any]] = []
    replace_launches(monkeypatch, lambda launcher, *_: launched.append(launcher.constants))
    p = torch.zeros(8, device=device, requires_grad=True)
    p.grad = torch.ones_like(p)
    triton_optim.AdamW([p], backend="triton").step()
    expected = multi_tensor.launch_options([4] * 4, 0, triton_launch.warp_size(device))
    assert launched[0].items() >= expected.items()
    assert expected["enable_fp_fusion"] is True
    triton_optim.LAMB([p], backend="triton").step()
    assert launched[1].items() >= expected.items()


# Of other releases than that of the bounds, only what is spilled is known.
TOO_MANY = "registers, over 64" if triton.__version__.startswith(f"{audit_bounds.RELEASE}.") else " spills, "

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
    "full chunks read under a mask": (
        "tl.load(pointers[i]) if FULL else",
        "tl.load(pointers[i], mask=start + item * PER_ITEM[i] != numel) if FULL else",
        "masked accesses in the full-chunk branch",
    ),
    "too few threads": ("BLOCK * widest // (16 * warp_size)", "1", TOO_MANY),
}


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the audit says of each mutation, and of misaligned accesses taken for aligned ones, for Adam on an H100."""
    folder = tmp_path_factory.mktemp("mutations")
    source = Path(inspect.getsourcefile(multi_tensor) or "").read_text()
    for name, (old, new, _) in MUTATIONS.items():
        assert source.count(old) == 1, f"the kernel no longer has what the mutation {name!r} changes"
        (folder / f"{name}.py").write_text(source.replace(old, new))
    # What is summed is read by the same function.
    of_sums = Path(inspect.getsourcefile(measure) or "").read_text().replace("from .multi_tensor", "from .masked")
    (folder / "sums").mkdir()
    (folder / "sums" / "mutated.py").write_text(of_sums)
    script = """
        import dataclasses, json, pathlib, sys
        from importlib.util import module_from_spec, spec_from_file_location
        from triton_optim.audit import bounds, cases as audited, measure as audit

        def module(path):
            spec = spec_from_file_location("triton_optim.kernels.mutated", path)
            made = module_from_spec(spec)
            spec.loader.exec_module(made)
            return made

        adam = next(rule for rule in audited.every_rule() if rule.name == "adam")
        built = {}
        folder = pathlib.Path(sys.argv[1])
        for path in folder.glob("*.py"):
            built[path.stem] = audit.build(adam, "fp32", "sm_90", kernel=module(path))
        built["misaligned"] = audit.build(adam, "fp32", "sm_90", aligned=False)
        sys.modules["triton_optim.kernels.masked"] = module(folder / "full chunks read under a mask.py")
        audit.measure = module(folder / "sums" / "mutated.py")
        sums = next(rule for rule in audited.every_rule() if rule.sums)
        built["sums under a mask"] = audit.build(sums, "fp32", "sm_90")
        measured = dict(zip(built, audit.read(list(built.values()))))
        measured["misaligned for aligned"] = dataclasses.replace(measured["misaligned"], aligned=True)
        found = {name: bounds.problems(m) for name, m in measured.items()}
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


def test_the_audit_catches_sums_of_full_chunks_under_a_mask(findings: dict[str, list[str]]) -> None:
    assert [problem.partition(" ")[2] for problem in findings["sums under a mask"]] == [
        "of 32 bits, under 128",
        "masked accesses in the full-chunk branch",
    ]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("--rule", "adm", "--rule adm: there is none. Choose from "),
        ("--arch", "sm_90,sm90", "--arch sm90: there is none. Choose from sm_80, "),
        ("--json", "/nowhere/a.json", "--json /nowhere/a.json: the folder /nowhere does not exist. Create it"),
    ],
)
def test_bad_options(option: str, given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(arguments(option, given)) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="a GPU is here, so this process compiles its kernels")
def test_under_the_interpreter_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(arguments()) == 1
    message = capsys.readouterr().err
    assert message.startswith("TRITON_INTERPRET=1 puts an interpreter in the place of Triton's compiler")
    assert "env -u TRITON_INTERPRET" in message


def test_what_is_summed_is_audited_with_its_rule() -> None:
    rules = {rule.name: rule for rule in audited.every_rule()}
    summed = {rule.measure: rule for rule in rules.values() if rule.measure}
    assert summed.keys() == {name for name, rule in rules.items() if rule.sums} > {"lamb_norms", "lars_norms"}
    assert {case.rule for case in audited.every_case(["lamb"])} == {"lamb", "lamb_norms"}
    lines = {line.partition(":")[0]: " ".join(line.split()) for line in command.passes(summed)}
    assert lines.keys() == {name for name, rule in rules.items() if rule.measure}
    assert lines["lamb"].endswith(
        "2 passes, 44 bytes for 28 of one; over each parameter: Squares of the parameter and of the update to come."
    )
    assert all(line.endswith(".") for line in lines.values()), "a measure says in its docstring what it sums"


def test_stateless_rules_have_no_states_in_their_dtypes() -> None:
    sgd = next(rule for rule in audited.every_rule() if not rule.states)
    (codec,) = audited.role_codecs(sgd, "bf16+fp32")
    assert codec.dtypes == (torch.bfloat16,)
