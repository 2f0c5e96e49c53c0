"""A new optimizer is a rule, a class and a row: everything else is derived."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import derived
import pytest

import triton_optim
from triton_optim.registry import optimizers, rule_optimizers

ROOT = Path(__file__).parents[1]
COPIED = ("triton_optim", "kernels", "tests", "docs", "README.md", "CONTRIBUTING.md", "pyproject.toml")
# The pieces, as CONTRIBUTING.md has them: a block of code begins with the place that it is for.
PIECES = dict(re.findall(r"```python\n# (\S[^\n]*)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S))
ROWS = "tests/table/elementwise.py"
# Of the row, what needs nothing compiled but C++.
RUN = (
    "references_by_hand.py::test_rows",
    "references_by_hand.py::test_every_reference_is_compared_with_something",
    "references.py",
    "accuracy.py::test_error_is_no_larger_than_torchs",
    "accuracy.py::test_states_match_the_reference",
    "options.py::test_help_has_a_line_for_each_option",
    "infinities.py",
)
WHOLE = ("new_optimizer.py::test_nothing_derived_is_out_of_step", "floors.py", "readme.py")
USE = """
import pickle, torch, triton_optim
from triton_optim import *
from triton_optim.registry import rule_optimizers
assert rule_optimizers()["yogi"] is Yogi is triton_optim.Yogi
p = torch.nn.Parameter(torch.ones(2))
optimizer = Yogi([p])
p.grad = torch.ones(2)
optimizer.step()
assert type(pickle.loads(pickle.dumps(optimizer))) is Yogi
print(triton_optim.__file__, triton_optim.kernels.rules.yogi.__file__)
"""


def test_nothing_derived_is_out_of_step() -> None:
    assert [path.name for path in derived.out_of_step()] == [], "run python tests/derived.py"


def test_what_is_derived_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    text, readme = derived.EXPORTS.read_text(), derived.README.read_text()
    found = derived.defined()
    assert derived.exports(text.replace("from .optimizers.lion import Lion\n", "").replace('    "Lion",\n', "")) == text
    assert "muon_param_groups" in derived.exports(text)
    monkeypatch.setattr(derived, "defined", lambda: found | {".optimizers.zeta": ["Zeta", "Beta"]})
    assert "from .optimizers.zeta import Beta, Zeta\n" in derived.exports(text)
    assert '    "Beta",\n' in derived.exports(text)
    assert "`ASGD`, `Beta`," in derived.readme(readme)
    assert "`Zeta`.\n" in derived.readme(readme)


def test_every_optimizer_is_known_by_its_name() -> None:
    names = {name for names in derived.defined().values() for name in names}
    assert {cls.__name__ for cls in optimizers().values()} == names <= {*triton_optim.__all__}
    assert optimizers().keys() - rule_optimizers().keys() == {"lbfgs", "nonlinearcg"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with one optimizer more."""
    assert not hasattr(triton_optim, "Yogi"), "it is ours now: CONTRIBUTING needs an example that is not"
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
        else:
            shutil.copy(ROOT / name, root / name)
    # As an installed package has it: an editable one's finder would find the kernels of the original.
    (root / "triton_optim" / "kernels").symlink_to(root / "kernels", target_is_directory=True)
    above, after = (root / ROWS).read_text().split("\nROWS = [\n")
    row, reference = PIECES.pop(f"{ROWS}, in ROWS"), PIECES.pop(f"{ROWS}, above ROWS")
    (root / ROWS).write_text(f"{above}\n{reference}\nROWS = [\n{row}{after}")
    assert list(PIECES) == ["kernels/rules/yogi.py", "triton_optim/optimizers/yogi.py"]
    for path, text in PIECES.items():
        (root / path).write_text(text)
    return root


def run(root: Path, *arguments: str) -> str:
    """What Python says there, where the copy is what is imported."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_rule_a_class_and_a_row_are_enough(copy: Path) -> None:
    written = run(copy, "tests/derived.py")
    assert written == "written: triton_optim/__init__.py, README.md, triton_optim/optimizers/README.md\n"
    assert run(copy, "-m", "triton_optim", "list", "yogi").startswith("Yogi\nfor        ")
    assert run(copy, "-c", USE).split() == [
        f"{copy}/triton_optim/__init__.py",
        f"{copy}/triton_optim/kernels/rules/yogi.py",
    ]
    tests = [f"tests/test_{name}" for name in (*RUN, *WHOLE)]
    chosen = "(Yogi and not (compiled or triton or float16)) or floors or nothing_derived"
    out = run(copy, "-m", "pytest", "-n0", "-v", "-p", "no:cacheprovider", *tests, "-k", chosen)
    passed = re.findall(r"^tests/test_(\S+) PASSED", out, re.M)
    for name in RUN:
        assert [test for test in passed if test.startswith(name) and "Yogi" in test], name
    for backend in ("eager", "cpp"):
        assert [test for test in passed if "states_match" in test and f"{backend}-Yogi-decay" in test], backend
