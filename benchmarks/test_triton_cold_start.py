"""How long do the first step and `warmup` of the Triton backend take in a fresh process with empty caches, and on what?

``--against FOLDER``, another checkout, is timed in turns with this one.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from first_launch import CALLS, CASES

from triton_optim.bench.measure import measure_processes

TARGET = 0.5  # of the other checkout's time


def importable(checkout: Path, folder: Path) -> Path:
    """Make `folder` one to import a checkout from, and return it.

    A checkout has triton_optim.kernels beside the package. With another checkout installed editably, Python would find
    that one's kernels.
    """
    package = folder / "triton_optim"
    package.mkdir(parents=True)
    for path in (checkout / "triton_optim").iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(checkout / "kernels")
    return folder


def first_launch(folder: Path, case: str, call: str, bytecode: Path) -> dict:
    """What ``first_launch.py`` says in a fresh process that imports the package from `folder`."""
    with tempfile.TemporaryDirectory() as cache:
        own = {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": cache, "PYTHONPYCACHEPREFIX": str(bytecode)}
        inherited = {n: v for n, v in os.environ.items() if n not in ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")}
        script = [sys.executable, str(Path(__file__).with_name("first_launch.py")), case, call]
        done = subprocess.run(script, env=inherited | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("from")).parent.parent == folder
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", CALLS)
def test_first_launch(
    case: str, call: str, tmp_path: Path, against: Path | None, runs: int, answer: Callable, patience: float
) -> None:
    checkouts = {"ours": Path(__file__).parents[1]} | ({} if against is None else {"theirs": against.resolve()})
    folders = {side: importable(checkout, tmp_path / side) for side, checkout in checkouts.items()}

    def run() -> dict[str, float]:
        return {side: first_launch(f, case, call, tmp_path / "bytecode")["seconds"] for side, f in folders.items()}

    # The first leaves the bytecode, and says what is compiled.
    compiled = {side: first_launch(f, case, call, tmp_path / "bytecode")["kernels"] for side, f in folders.items()}
    m = measure_processes(run, patience, runs=runs)
    figures = {f"{side} s": m.median(side) for side in folders} | {"compiled": compiled}
    names = [kernel["kernel"] for kernel in compiled["ours"]]
    text = f"{m.median('ours'):.2f} s, compiling {', '.join(names)}"
    ratio = None
    if against is not None:
        ratio = m.ratio("ours", "theirs")
        text += f"; the other checkout {m.median('theirs'):.2f} s, {ratio:.2f} x"
    answer(f"{case}, {call}, empty caches", text, figures, value=ratio, target=TARGET, measurement=m)
