"""The model of a GPU against cases computed by hand, and the command that shows what it says."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed, and there is nothing to compile", allow_module_level=True)

from triton_optim.audit import cases as audited
from triton_optim.audit import predict
from triton_optim.audit.gpu_model import Kernel, estimate, resident_programs
from triton_optim.audit.gpus import GPUS, SM_80, Gpu
from triton_optim.bench.models import shapes
from triton_optim.cli import audit as command

# 10 units with 4 schedulers each, at 1 GHz, and 1 TB/s of which half is reached.
GPU = Gpu("", "", "", SM_80, units=10, clock=1e9, memory=1e12, bandwidth=1e12, share=0.5, source="")
KERNEL = Kernel(registers=64, num_warps=8, block=1024, shared_bytes=0, loaded=16, stored=12, instructions=25)
LONG = [800 * 1024]


def test_the_parts_of_a_step_by_hand() -> None:
    """64 registers leave 8 of 16 warps a scheduler: 4 programs of 8 warps. 25 instructions of 32 warps take 0.2 us."""
    e = estimate(GPU, KERNEL, LONG)
    assert (e.programs, e.waves, e.tail, e.warps, e.most_warps) == (800, 20, 0, 32, 64)
    assert e.at_peak == pytest.approx(800 * 1024 * 28 / 1e12)
    assert e.memory == pytest.approx(2 * e.at_peak)
    assert e.issue == pytest.approx(16e-6)
    lifetime = 3 * 0.3e-6 + 0.8e-6 + 0.2e-6
    assert e.latency == pytest.approx(19 * lifetime)
    assert e.ends == pytest.approx(3e-6 + lifetime)
    assert e.total == pytest.approx(e.memory + e.ends)
    assert e.in_flight == 4 * 1024 * 16
    assert e.needed == pytest.approx(0.5e12 * 16 / 28 * 0.8e-6 / 10)


@pytest.mark.parametrize(
    ("gpu", "kernel", "numels", "limit"),
    [
        (GPU, KERNEL, LONG, "memory"),
        (GPU, KERNEL._replace(instructions=100), LONG, "instruction issue"),
        (GPU, KERNEL._replace(registers=128), LONG, "latency"),
        (GPU._replace(share=1.0), KERNEL, LONG, "latency"),
        (GPU, KERNEL, [10] * 3, "launches and tails"),
    ],
)
def test_the_limit_is_named(gpu: Gpu, kernel: Kernel, numels: list[int], limit: str) -> None:
    assert estimate(gpu, kernel, numels).limit == limit


@pytest.mark.parametrize(
    ("gpu", "changes", "programs"),
    [
        (GPU, {"registers": 32}, 8),  # all 64 warps
        (GPU, {"registers": 65}, 3),  # 72 are taken: 7 warps a scheduler, 28 in all
        (GPU, {"registers": 32, "num_warps": 1}, 32),  # no more programs
        (GPU, {"shared_bytes": 53 * 1024}, 3),  # of 164 KiB, each with 1 beside
        (GPUS["mi300x"], {"registers": 72, "num_warps": 4}, 7),
        (GPUS["mi300x"], {"registers": 73, "num_warps": 4}, 6),
    ],
)
def test_resident_programs(gpu: Gpu, changes: dict[str, int], programs: int) -> None:
    assert resident_programs(gpu, KERNEL._replace(**changes)) == programs


def test_a_wave_of_amd_takes_four_cycles() -> None:
    amd = GPU._replace(unit=GPUS["mi300x"].unit)
    assert estimate(amd, KERNEL, LONG).issue == 2 * estimate(GPU, KERNEL, LONG).issue


def test_launches_tails_and_the_norm() -> None:
    one, three = estimate(GPU, KERNEL, LONG), estimate(GPU, KERNEL, LONG, norm_bytes=4)
    assert (one.launches, three.launches) == (1, 3)
    assert three.ends == pytest.approx(3 * one.ends)
    assert three.memory == pytest.approx(one.memory * 32 / 28)
    assert estimate(GPU, KERNEL, [1024] * 30 + [1]).tail == pytest.approx(1 - 31 / 40)


def measurement(dtypes: str) -> Any:
    return SimpleNamespace(dtypes=dtypes, sums=False, **KERNEL._asdict())


def test_what_is_too_small_for_codes_has_a_launch_of_its_own() -> None:
    for numels, launches in (([4096, 10], 2), ([4096], 1), ([10], 1)):
        assert predict.predict(GPU, [measurement("bf16 int8")], numels).launches == launches
        assert predict.predict(GPU, [measurement("bf16")], numels).launches == 1
    assert predict.predict(GPU, [measurement("fp32 whole")], [10]).launches == 3


def test_what_is_summed_before_is_a_pass_of_its_own() -> None:
    first = measurement("fp32")
    first.sums, first.stored = True, 0
    second = measurement("fp32")
    alone, both = predict.predict(GPU, [second], LONG), predict.predict(GPU, [first, second], LONG)
    assert both.at_peak == pytest.approx(alone.at_peak * (28 + 16) / 28)
    assert (both.launches, both.programs) == (3, 2 * alone.programs)
    assert both.total == pytest.approx(alone.total + estimate(GPU, KERNEL._replace(stored=0), LONG, launches=2).total)


def rule(name: str) -> audited.AuditedRule:
    return next(rule for rule in audited.every_rule() if rule.name == name)


def test_what_is_kept_and_what_fits() -> None:
    assert predict.bytes_kept(rule("adamw"), "fp32", [1000]) == 16_000
    assert predict.bytes_kept(rule("adamw"), "bf16 master", [1000]) == 12_000
    assert predict.bytes_kept(rule("adamw"), "bf16 int8", [1000]) == 6_031.25
    assert predict.what_fits(rule("adamw"), [1000], 6_000) == ["bf16 int4"]


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("h200", "NVIDIA H200"),
        ("b200", "NVIDIA B200"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("mi300x", "AMD Instinct MI300X VF"),
    ],
)
def test_gpus_know_their_names(gpu: str, device: str) -> None:
    others = ["NVIDIA GB200", "NVIDIA H200 NVL", "NVIDIA A100-PCIE-40GB", "cpu"]
    assert [name for name, g in GPUS.items() if re.search(g.device, device)] == [gpu]
    assert not [name for name in others if re.search(GPUS[gpu].device, name)]
    assert GPUS[gpu].arch in audited.TARGETS


def measured(case: str) -> predict.Measured:
    return predict.Measured("NVIDIA H200", case, 1.0, "", "")


@pytest.mark.parametrize(
    ("case", "name", "dtypes"),
    [
        ("AdamW, gpt2 (148 tensors)", "adamw", "fp32"),
        ("AdamW, gpt2 (148 tensors), time over the floor", "adamw", "fp32"),
        ("AdamW amsgrad, gpt2 (148 tensors), bfloat16", "adamw_amsgrad", "bf16"),
        ("AdamW fp32, int8 states, gpt2 (148 tensors), state_dtype=int8", "adamw", "fp32 int8"),
        ("AdamW bf16 kahan, gpt2 (148 tensors), bfloat16, param_precision=kahan, ms", "adamw", "bf16 kahan"),
        ("SGD, gpt2 (148 tensors)", "sgd_momentum", "fp32"),
        ("SGD without momentum, gpt2 (148 tensors), float64", "sgd", "fp64"),
        ("AdamW, gpt2 (148 tensors), bfloat16, state_dtype=int8, param_precision=stochastic", "adamw", "bf16 int8"),
        ("Lion, gpt2 (148 tensors), float16", "lion", "fp16"),
    ],
)
def test_a_measured_step_is_known_again(case: str, name: str, dtypes: str) -> None:
    assert [d for d in audited.DTYPES if predict.is_this(measured(case), rule(name), d, "gpt2")] == [dtypes]
    assert not predict.is_this(measured(case.replace("148", "147")), rule(name), dtypes, "gpt2")
    assert not predict.is_this(measured(case), rule("asgd"), dtypes, "gpt2")
    assert not predict.is_this(measured(case), rule(name), dtypes, "resnet50")


def test_results_of_a_cpu_say_nothing_of_a_gpu() -> None:
    assert len(shapes("gpt2")) == 148
    devices = {step.device for step in predict.measured_steps(Path(__file__).parents[1] / "benchmarks" / "results")}
    assert "cpu" not in devices


def test_the_command(tmp_path: Path) -> None:
    record = {"case": "AdamW, 64M16 (16 tensors)", "figures": {"ours ms": 0.456}}
    results = {"machine": {"device": "NVIDIA H200"}, "date": "2026-11-21", "records": [record]}
    (tmp_path / "gpu_step.json").write_text(json.dumps(results))
    out = tmp_path / "out" / "predicted.json"
    out.parent.mkdir()
    words = [sys.executable, "-m", "triton_optim", "audit", "--predict", "h200,mi300x", "--model", "64M16,llama3_8b"]
    words += ["--kept", "fp32", "--results", str(tmp_path), "--json", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert max(map(len, done.stdout.replace(str(out), "").splitlines())) <= 120
    assert "measured on NVIDIA H200: 0.456 ms, 2026-11-21, gpu_step.json" in done.stdout
    content = json.loads(out.read_text())
    predicted = {(p["gpu"], p["model"]): p for p in content["predictions"]}
    assert predicted.keys() == {(g, m) for g in ("h200", "mi300x") for m in ("64M16", "llama3_8b")}
    llama = predicted["h200", "llama3_8b"]
    assert llama["estimate"]["limit"] == "memory"
    assert llama["estimate"]["at_peak"] == pytest.approx(8030261248 * 28 / 4.8e12)
    assert [m["ms"] for m in predicted["h200", "64M16"]["measured"]] == [0.456]
    assert predicted["mi300x", "64M16"]["measured"] == llama["measured"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--predict", "h100"], "--predict h100: there is none. Choose from h200, b200, a100, mi300x."),
        (["--predict", "h200", "--model", "gpt5"], "model 'gpt5': there is none. Choose from resnet50, "),
        (["--predict", "h200", "--kept", "fp8"], "--kept fp8: there is none. Choose from fp32, "),
        (["--predict", "h200", "--rule", "adm"], "--rule adm: there is none. Choose from "),
        (["--predict", "h200", "--arch", "sm_90"], "--arch sm_90 says nothing to --predict"),
        (["--predict", "h200", "--results", "/nowhere"], "--results /nowhere: there is no such folder."),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(options)) == 1
    assert capsys.readouterr().err.startswith(message)


def test_a_model_that_does_not_fit_says_what_would() -> None:
    from triton_optim.cli.audit_predict import remarks

    own = estimate(GPU, KERNEL, [10])
    (line,) = remarks(predict.Prediction("a100", "llama3_8b", "adamw", "fp32", own, 128.5e9, 80e9, []))
    assert line.startswith("adamw, fp32, llama3_8b does not fit: parameters, gradients and states take 119.675 GiB")
    assert line.endswith("What would: bf16, fp16, bf16 stochastic, bf16 split24, bf16 int8, bf16 int4.")
