"""Write what is derived from the optimizers' files: ``python tests/derived.py``.

These are the exports in `triton_optim/__init__.py`, README's list and the table in `triton_optim/optimizers/README.md`;
with ``--costs`` the tables in `tests/costs/`, too. Tests fail where they differ.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from costs import REWRITE

from triton_optim import RuleOptimizer, optimizers
from triton_optim.catalog import ABOUT, entries
from triton_optim.optimizers.closure.closure_driven import ClosureOptimizer

ROOT = Path(optimizers.__file__ or "").parents[2]
EXPORTS, README = ROOT / "triton_optim" / "__init__.py", ROOT / "README.md"
TABLE = ROOT / "triton_optim" / "optimizers" / "README.md"
START, END = "<!-- optimizers: written by tests/derived.py -->", "<!-- end of optimizers -->"
INTRODUCTION = """\
The optimizers and, last, the wrappers, as `triton-optim list` has them; `triton-optim list adamw` says more of one, and
`--kind eval` chooses. `state` is in bytes a parameter, and `step` is what a step moves beside AdamW's: below the table
both are said exactly. Written by `python tests/derived.py`, from the classes and their docstrings."""
BASES = (RuleOptimizer, ClosureOptimizer)


def defined() -> dict[str, list[str]]:
    """The optimizers that each module defines, by its name below the package."""
    found: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(optimizers.__path__, "triton_optim.optimizers."):
        for name, value in vars(import_module(module.name)).items():
            if isinstance(value, type) and issubclass(value, BASES) and value not in BASES and name[0] != "_":
                found.setdefault(value.__module__.removeprefix("triton_optim"), []).append(name)
    return {module: names for module, names in found.items() if module.startswith(".optimizers.")}


def in_order(names: set[str]) -> list[str]:
    """As ruff sorts them: constants, classes, functions."""
    return sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))


def exports(text: str) -> str:
    """`triton_optim/__init__.py` with every optimizer, and the functions that are imported of modules beside theirs."""
    modules = {module: set(names) for module, names in defined().items()}
    for module, names in re.findall(r"^from (\.optimizers\.\S+) import (.*)\n", text, re.M):
        if functions := {name for name in names.split(", ") if name[0].islower()}:
            modules.setdefault(module, set()).update(functions)
    lines = "".join(f"from {module} import {', '.join(in_order(modules[module]))}\n" for module in sorted(modules))
    text = re.sub(r"(^from \.optimizers\.\S+ import .*\n)+", lambda _: lines, text, flags=re.M)
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    public = in_order({alias.name for node in imports for alias in node.names})
    listed = "".join(f'    "{name}",\n' for name in public)
    return re.sub(r"__all__ = \[\n.*?\]\n", lambda _: f"__all__ = [\n{listed}]\n", text, flags=re.S)


def readme(text: str) -> str:
    """README with the list of the optimizers, as many in a line as fit."""
    names = sorted({name for names in defined().values() for name in names}, key=str.lower)
    lines = [""]
    for item in [f"`{name}`," for name in names[:-1]] + [f"`{names[-1]}`."]:
        if len(lines[-1]) + len(item) > 118:
            lines.append("")
        lines[-1] += " " * bool(lines[-1]) + item
    before, rest = text.split(START)
    return "\n".join((before + START, *lines, END)) + rest.split(END)[1]


def table() -> str:
    """The page that one chooses an optimizer from: what `triton-optim list` says."""
    found = {(module, name) for module, names in defined().items() for name in names}
    classes = [getattr(import_module(f"triton_optim{module}"), name) for module, name in found]
    rows = [["optimizer", "kind", "state", "step", "paper", "when to use it"], ["---"] * 6]
    for e in entries(classes):
        paper = f"[{e.paper}]({e.url})" if e.url else e.paper
        rows.append([f"`{e.name}`", e.kind, e.state, e.step, paper, e.use.replace("``", "`")])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = re.sub(r"^(state|step): ", r"\n`\1`: ", ABOUT, flags=re.M).strip()
    return f"# Which optimizer\n\n{INTRODUCTION}\n\n{lines}\n\n{about}\n"


def out_of_step() -> dict[Path, str]:
    """The files that are not what they should be, with that."""
    wanted = {EXPORTS: exports(EXPORTS.read_text()), README: readme(README.read_text()), TABLE: table()}
    return {path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text}


def main() -> None:
    """Write what is out of step, and the costs if asked to."""
    stale = out_of_step()
    for path, text in stale.items():
        path.write_text(text)
    print(f"written: {', '.join(str(path.relative_to(ROOT)) for path in stale) or 'nothing, all was in step'}")
    if "--costs" in sys.argv[1:]:
        sys.exit(subprocess.run([sys.executable, "-m", *REWRITE.split()], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
