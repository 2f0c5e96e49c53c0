"""A race as one page, which needs no other file: the table, sortable by every column, notes, the picture, all runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from .records import Record
from .results import HEADER, Results, Standing, beside_published, cells

RUNS = ("optimizer", "schedule", "lr", "seed", "outcome", "best loss", "last loss")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #1b6ca8; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: #f2f6fa; }
img { max-width: 100%; height: auto; }
"""
# Cells have what they are sorted by in data-by; those without a value come last in either direction.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.by;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
"""


def page(results: Results) -> str:
    """The HTML text."""
    title = f"Race on {results.task}: {results.steps} steps, {results.seeds} seeds, {results.device}"
    notes = [f"{s.optimizer}: {note}" for s in results.standings for note in s.notes]
    target = "" if results.target is None else f" “steps” and “time” are those to a loss of {results.target:.4g}."
    published = beside_published(results)
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p>Every optimizer under its best schedule and learning rate: the lowest mean, over seeds, of the best "
        f"validation loss.{target} A column's name sorts by it.</p>",
        html_table(HEADER, [cells(s) for s in results.standings], [sort_keys(s) for s in results.standings]),
        "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else "",
        f"<pre>{escape(chr(10).join(published).strip())}</pre>" if published else "",
        f'<p><img alt="losses over steps, time and learning rates" src="{picture(results)}"></p>',
        f"<details><summary>All {len(results.records)} runs</summary>",
        html_table(RUNS, [run_cells(r) for r in results.records], [run_keys(r) for r in results.records]),
        "</details>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], keys: Sequence[Sequence[Any]]) -> str:
    """A table that sorts.

    Args:
        keys: what each cell is sorted by; None where it has no value.
    """
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in header)
    lines = []
    for row, own in zip(rows, keys, strict=True):
        line = "".join(
            f'<td data-by="{"" if key is None else escape(str(key))}">{escape(cell)}</td>'
            for cell, key in zip(row, own, strict=True)
        )
        lines.append(f"<tr>{line}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="sortable">\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def sort_keys(s: Standing) -> list[Any]:
    """What the cells of a standing are sorted by, in the order of `HEADER`."""
    numbers = (s.lr, s.best, s.final, s.steps_to_target, s.seconds_to_target, s.step_seconds, s.whole_seconds)
    return [s.optimizer, s.schedule, *numbers, s.state_bytes]


def run_cells(record: Record) -> list[str]:
    """The cells of a run, under `RUNS`."""
    losses = (f"{record.best:.4g}", f"{record.validation[-1]:.4g}")
    return [record.optimizer, record.schedule, f"{record.lr:g}", str(record.seed), record.status, *losses]


def run_keys(record: Record) -> list[Any]:
    """What the cells of a run are sorted by."""
    return [
        *(record.optimizer, record.schedule, record.lr, record.seed, record.status),
        *(loss if loss == loss else None for loss in (record.best, record.validation[-1])),
    ]


def picture(results: Results) -> str:
    """The picture, as the address of an image that holds it."""
    buffer = io.BytesIO()
    results.figure().savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
