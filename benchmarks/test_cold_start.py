"""How long does the first step take in a fresh process, with empty compiler caches and with filled ones?"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from triton_optim.bench.measure import measure_processes
from triton_optim.bench.models import shapes

# Device and seconds to reach; of the first step; with filled caches on a GPU nothing was promised.
DEVICES = [pytest.param("cpu", 1.0, id="cpu"), pytest.param("gpu", 1.5, id="gpu", marks=pytest.mark.gpu)]
WARM = {"cpu": 0.1, "gpu": None}
COMMON = ("AdamW", "SGD", "Lion")
COMMON_TARGET = 0.15


def environment(own: Path) -> dict[str, str]:
    """That of a process whose bytecode is kept in a folder. pip compiles what it installs to bytecode; a checkout, or a
    machine that keeps none, must not be charged for it.
    """
    inherited = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")}
    return inherited | {"PYTHONPYCACHEPREFIX": str(own / "bytecode")}


@pytest.mark.parametrize(("kind", "target"), DEVICES)
@pytest.mark.parametrize("model", ["1000x1k", "resnet50"])
def test_first_step(
    model: str,
    kind: str,
    target: float,
    device: torch.device,
    tmp_path: Path,
    benchmark: Callable,
    answer: Callable,
    patience: float,
) -> None:
    where, backend = ("cpu", "cpp") if kind == "cpu" else (device.type, "triton")
    script = [sys.executable, str(Path(__file__).with_name("first_step.py")), model, where]
    inherited = environment(tmp_path)

    def first_step(caches: Path) -> dict:
        folders = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TRITON_OPTIM_CACHE_DIR": "cpp"}
        own = {variable: str(caches / folder) for variable, folder in folders.items()}
        output = subprocess.run(script, env=inherited | own, capture_output=True, text=True, check=True).stdout
        figures = json.loads(output)
        assert figures.pop("backend") == backend
        return figures

    folders = (tmp_path / str(i) for i in range(1000))
    first_step(next(folders))  # which leaves the bytecode
    cold = measure_processes(lambda: first_step(next(folders)), patience, runs=3)
    warm = measure_processes(lambda: first_step(tmp_path / "0"), patience, runs=5)
    # The targets are for a thousand tensors of one size.
    limits = (target, WARM[kind]) if model == "1000x1k" else (None, None)
    for caches, m, limit in (("empty", cold, limits[0]), ("filled", warm, limits[1])):
        figures = {name: m.median(name) for name in m.rounds[0]}
        case = f"AdamW, {model} ({len(shapes(model))} tensors), {kind}, {caches} caches"
        text = f"{figures['first step s']:.2f} s, the second {1e3 * figures['second step s']:.1f} ms"
        answer(case, text, figures, value=figures["first step s"], target=limit, measurement=m)
    # The table shows the whole process, imports included, with filled caches.
    benchmark.pedantic(first_step, args=(tmp_path / "0",), rounds=1)


@pytest.mark.parametrize("training", [False, True], ids=["at-once", "after-a-backward-pass"])
def test_common_rules(
    training: bool, tmp_path: Path, benchmark: Callable, answer: Callable, patience: float, runs: int
) -> None:
    """Of the demo's network: the making of the optimizer and a step at once; and a step after a forward and a backward
    pass, beside which the loop is built.
    """
    inherited, script = environment(tmp_path), str(Path(__file__).with_name("first_training_step.py"))
    folders = (str(tmp_path / str(i)) for i in range(1000))

    def first_step(name: str) -> dict[str, float]:
        command = [sys.executable, script, name, *["trained"] * training]
        own = inherited | {"TRITON_OPTIM_CACHE_DIR": next(folders)}
        return json.loads(subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout)

    def each() -> dict[str, float]:
        return {f"{name}, {what}": seconds for name in COMMON for what, seconds in first_step(name).items()}

    first_step("AdamW")  # which leaves the bytecode
    m = measure_processes(each, patience, runs)
    for name in COMMON:
        figures = {what: m.median(f"{name}, {what}") for what in ("made s", "first step s", "both s")}
        value = figures["first step s" if training else "both s"]
        case = f"{name}, {'a first training step' if training else 'made and stepped at once'}, empty caches"
        answer(case, f"{value:.3f} s", figures, value=value, target=COMMON_TARGET, measurement=m)
    benchmark.pedantic(first_step, args=("AdamW",), rounds=1)
