"""The package as compiled Python files alone: what compiles its sources is out, and says so; the rest runs."""

import compileall
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import triton_optim

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import triton_optim

assert triton_optim.__file__.endswith(".pyc"), triton_optim.__file__
p = torch.nn.Parameter(torch.ones(3))
for options in ({"backend": "eager"}, {"fused": False}):
    p.grad = torch.ones(3)
    triton_optim.SGD([p], lr=0.25, max_grad_norm=9.0, **options).step()
assert p.tolist() == [0.5] * 3, p
(row,) = triton_optim.explain(triton_optim.SGD([p]))
assert row.backend in ("compiled", "eager"), row
p.grad = torch.ones(3)
assert abs(float(triton_optim.clip_grad_norm_([p], 1.0)) - 3**0.5) < 1e-6
for backend in ("triton", "cpp"):
    try:
        triton_optim.SGD([p], backend=backend)
    except RuntimeError as error:
        print(error)
"""


def test_compiled_files_alone(tmp_path: Path) -> None:
    package = tmp_path / "triton_optim"
    leave = shutil.ignore_patterns("__pycache__", "bench", "race")
    shutil.copytree(Path(triton_optim.__file__).parent, package, ignore=leave)
    assert compileall.compile_dir(package, quiet=1, legacy=True)
    for path in package.rglob("*.py"):
        path.unlink()
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 2
    assert "triton_optim, of which only .pyc files are installed. Install them" in said[1]
    if triton_optim.dispatch.this_machine().triton:
        assert "only .pyc files are installed" in said[0]
