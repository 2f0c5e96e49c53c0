"""The mutants of `benchmarks/mutations/` are edits of the code as it is, and name tests that there are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "mutations").exists():
    pytest.skip("there are no benchmarks beside these tests", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    from mutations import MUTANTS, place_of
each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@each_mutant
def test_a_mutant_is_one_edit(mutant: Any) -> None:
    place = place_of(mutant)
    text = place.read_text()
    edited = text.replace(mutant.old, mutant.new)
    assert edited != text
    if place.suffix == ".py":
        compile(edited, place, "exec")  # else any test would notice


@each_mutant
def test_the_test_that_should_notice_it_is_there(mutant: Any) -> None:
    file, _, name = mutant.test.partition("::")
    assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_every_mutant_has_a_name_of_its_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len({*names}) == len(names) >= 40


def test_what_a_mutant_changes_is_there_once() -> None:
    mutant = MUTANTS[0]
    for old, places in (("no such code", "no file"), ("from __future__ import annotations", "triton_optim")):
        with pytest.raises(ValueError, match=places):
            place_of(mutant._replace(old=old))
