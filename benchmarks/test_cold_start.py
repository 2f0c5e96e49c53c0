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
    inherited = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")}
    # pip compiles what it installs to bytecode; a checkout, or a machine that keeps none, must not be charged for it.
    inherited["PYTHONPYCACHEPREFIX"] = str(tmp_path / "bytecode")

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
