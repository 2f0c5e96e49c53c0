"""The committed tables of what is built, `tests/costs/`: what is built now must be what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).with_name("costs")
TESTS = ("audit", "gradient_norm", "costs", "launch")
REWRITE = f"pytest {' '.join(f'tests/test_{name}.py' for name in TESTS)} -k costs --write-costs"

Costs = dict[str, dict[str, Any]]


def compare(name: str, found: Costs, write: bool, triton: str | None = None, folder: Path = FOLDER) -> None:
    """Fail unless the table is `found`, or write it.

    Args:
        name: the table's.
        found: what each case came to.
        write: write the table instead.
        triton: the version that compiled. The table of another says nothing, and the test is skipped.
    """
    path = folder / f"{name}.json"
    if write:
        path.write_text(as_text(found, triton))
        return
    table = json.loads(path.read_text())
    if table["triton"] != triton:
        pytest.skip(f"{path.name} is of Triton {table['triton']}, and {triton} has a compiler of its own")
    changed = differences(table["cases"], found)
    assert not changed, (
        f"what is built is not what tests/costs/{path.name} says. If that is meant, commit what this writes:\n"
        f"{REWRITE}\n" + "\n".join(changed)
    )


def differences(old: Costs, new: Costs) -> list[str]:
    """What changed, a line for each case."""
    lines = []
    for case in sorted(old.keys() | new.keys()):
        if case not in new:
            lines.append(f"{case}: gone")
        elif case not in old:
            lines.append(f"{case}: new, {json.dumps(new[case])}")
        elif old[case] != new[case]:
            fields = [key for key in {**old[case], **new[case]} if old[case].get(key) != new[case].get(key)]
            lines.append(f"{case}: " + ", ".join(f"{f} {old[case].get(f)} -> {new[case].get(f)}" for f in fields))
    return lines


def as_text(costs: Costs, triton: str | None) -> str:
    """JSON, a line for each case, sorted, so that a change is a line of a diff."""
    cases = ",\n".join(f"  {json.dumps(case)}: {json.dumps(costs[case])}" for case in sorted(costs))
    return f'{{\n "triton": {json.dumps(triton)},\n "cases": {{\n{cases}\n }}\n}}\n'
