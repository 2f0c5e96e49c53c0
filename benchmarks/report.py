"""Write README's table of numbers from the committed results: ``python benchmarks/report.py``."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"


def table() -> str:
    """One line a measured case, and where it was measured."""
    lines = ["| measured | result | target |", "|---|---|---|"]
    places: list[str] = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        machine, versions = result["machine"], result["versions"]
        place = (
            f"{machine['processor']}, {machine['cores']} cores, {machine['device']}, torch {versions['torch']}, "
            f"Triton {versions['triton']}, {result['date'][:10]}, commit {result['source']}"
        )
        places += [place] if place not in places else []
        for record in result["records"]:
            target = record.get("target")
            met = {True: "met", False: "not met", None: ""}[record.get("met")]
            lines.append(f"| {record['case']} | {record['text']} | {target or ''} {met} |")
    source = "Medians of interleaved runs; the commands and every sample are in `benchmarks/results/`."
    return "\n".join([*lines, "", source, *places])


def written(readme: str) -> str:
    """`readme` with the table brought up to date."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
