"""How `triton-optim bench` looks: a table for each case, and a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bench.comparison import Comparison, Row
from ..util.table import readable_seconds
from .terminal import new_table, say

if TYPE_CHECKING:
    from rich.console import Console


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The sides of a case with the bytes of state they keep, why others were not timed, and how far to trust it."""
    case = comparison.case
    say(console, f"\n{case.name}", style="bold")
    table = new_table("side", "a step", "ours takes", "by round", "bytes/param", "differs by")
    for row in comparison.rows:
        if row.seconds is not None:
            table.add_row(*cells(row, comparison.backends))
    console.print(table)
    for row in comparison.rows:
        if row.reason:
            say(console, f"{row.side}: {row.reason}", style="bold red" if row.side in comparison.disagreeing else None)
    if case.cut:
        say(console, f"{case.model} is {case.cut}")
    if comparison.measurement is not None:
        say(console, comparison.measurement.quality())


def cells(row: Row, backends: list[str]) -> list[str]:
    """A row of the table."""
    assert row.seconds is not None
    ratio = [f"{row.ratio[0]:.3f} x", f"{row.ratio[1]:.3f} to {row.ratio[2]:.3f}"] if row.ratio else ["", ""]
    name = f"{row.side} ({', '.join(backends)})" if row.side == "ours" else row.side
    kept = "" if row.state_bytes is None else f"{row.state_bytes:.4g}"
    differs = f"{row.difference.share:.1e} (<= {row.difference.allowed:g})" if row.difference else ""
    return [name, readable_seconds(row.seconds), *ratio, kept, differs]
