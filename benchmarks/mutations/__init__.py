"""Edits of the code that some test must notice: for `mutants.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from . import arithmetic, families, steps
from .mutant import Mutant as Mutant

ROOT = Path(__file__).parents[2]
FOLDERS, SUFFIXES = ("triton_optim", "kernels"), (".py", ".h", ".cpp")


@cache
def sources() -> dict[Path, str]:
    """The code."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    files = (path for path in files if ROOT / "triton_optim/kernels" not in path.parents)  # in an sdist, the same again
    return {path: path.read_text() for path in sorted(files)}


def place_of(mutant: Mutant) -> Path:
    """The file that a mutant is an edit of.

    Raises:
        ValueError: what it changes is not there, or more than once.
    """
    found = [path for path, text in sources().items() for _ in range(text.count(mutant.old))]
    if len(found) != 1:
        places = ", ".join(str(path.relative_to(ROOT)) for path in found) or "no file"
        raise ValueError(f"{mutant.name!r} changes {mutant.old!r}, which is in {places}. Give what is there once.")
    return found[0]


MUTANTS = (*arithmetic.MUTANTS, *steps.MUTANTS, *families.MUTANTS)
