"""Pictures of times: bars, a group for each case. The file carries a digest of what it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..util.pictures import new_figure, open_frame
from .comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "#1b6ca8"
PEERS = ("#d95f02", "#f2b27a", "#8a8a8a", "#c9c9c9", "#5aae8b", "#9b6fb0", "#b8a13c", "#4d4d4d")

# Milliseconds by side, by case.
Times = Mapping[str, Mapping[str, float]]


def times_of(comparisons: Sequence[Comparison]) -> dict[str, dict[str, float]]:
    """Milliseconds of the sides that were timed."""
    return {
        one.case.name: {row.side: 1e3 * row.seconds for row in one.rows if row.seconds is not None}
        for one in comparisons
    }


def digest(times: Times, title: str) -> str:
    """What a picture of these times carries: a picture is up to date if its file has it."""
    return hashlib.sha256(json.dumps([title, times]).encode()).hexdigest()


def save_bars(path: Path, times: Times, title: str) -> None:
    """Draw the times in units of that of a case's first side, in the format that the suffix of `path` names."""
    import matplotlib

    # The same data gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "triton-optim", "svg.fonttype": "none"}):
        metadata = {"Title": f"data {digest(times, title)}"}
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
        bars(times, title).savefig(path, metadata={**metadata, **undated})


def bars(times: Times, title: str) -> Figure:
    """The figure of `save_bars`."""
    from matplotlib.patches import Patch

    sides = list(dict.fromkeys(side for case in times.values() for side in case))
    colours = {side: OURS if side.startswith("ours") else PEERS[(i - 1) % len(PEERS)] for i, side in enumerate(sides)}
    height = sum(len(case) + 1 for case in times.values())
    figure = new_figure(8, max(2.0, 0.6 + 0.17 * height), dpi=150)
    axes = figure.subplots()
    ticks: list[float] = []
    y = 0.0
    for case in times.values():
        ticks.append(y + (len(case) - 1) / 2)
        unit = next(iter(case.values()))
        for side, ms in case.items():
            axes.barh(y, ms / unit, height=0.9, color=colours[side])
            axes.annotate(
                f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms",
                (ms / unit, y),
                (2, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
            y += 1
        y += 1
    axes.axvline(1, color=OURS, linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, list(times), fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("times as long as ours; in figures, the time of a step")
    axes.set_title(title, fontsize="medium")
    handles = [Patch(color=colours[side], label=side) for side in sides]
    figure.legend(
        handles=handles, frameon=False, fontsize="small", ncols=min(4, len(sides)), loc="outside lower center"
    )
    open_frame(axes)
    return figure
