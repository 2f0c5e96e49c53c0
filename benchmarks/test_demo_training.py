"""How long is the whole training of `triton-optim demo`, with the making of the optimizer and its first step, beside
torch's, in fresh processes with filled caches?
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from triton_optim.bench.measure import measure_processes

SIDES = ("ours", "torch", "torch_fused")
TARGET = 0.9


def test_training(tmp_path: Path, benchmark: Callable, answer: Callable, patience: float, runs: int) -> None:
    inherited = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")}
    inherited |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "TRITON_OPTIM_CACHE_DIR": str(tmp_path / "cpp")}
    script, shuffle = Path(__file__).with_name("demo_training.py"), random.Random(0).shuffle

    def training(side: str) -> dict[str, float]:
        command = [sys.executable, str(script), side]
        return json.loads(subprocess.run(command, env=inherited, capture_output=True, text=True, check=True).stdout)

    def each() -> dict[str, float]:
        order = list(SIDES)
        shuffle(order)
        found = {side: training(side) for side in order}
        return {(side if what == "training" else f"{side}, {what}"): seconds
                for side, own in found.items() for what, seconds in own.items()}  # fmt: skip

    for _ in range(2):  # the second finds on disk what the first compiled beside its training
        training("ours")
    m = measure_processes(each, patience, runs)
    ratios, words = m.compared("ours", SIDES[1:])
    own = {name: m.median(f"ours, {name}") for name in ("made", "first step")}
    text = f"ours {m.median('ours'):.2f} s, of which {1e3 * own['made']:.0f} ms to make the optimizer and "
    text += f"{1e3 * own['first step']:.0f} ms the first step; {words}, {m.ratio('ours', 'torch'):.3f} x its default"
    figures = {f"{name} s": m.median(name) for name in m.rounds[0]} | ratios
    answer("The demo's whole training, filled caches", text, figures, value=ratios["ratio"], target=TARGET,
           measurement=m)  # fmt: skip
    benchmark.pedantic(training, args=("ours",), rounds=1)
