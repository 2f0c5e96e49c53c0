"""Pictures of times: bars, a group for each case, and lines over sizes. The file carries a digest of what it shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..util.pictures import new_figure, open_frame
from .comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "#1b6ca8"
PEERS = ("#d95f02", "#f2b27a", "#8a8a8a", "#c9c9c9", "#5aae8b", "#9b6fb0", "#b8a13c", "#4d4d4d")

# Milliseconds by side, by case.
Times = Mapping[str, Mapping[str, float]]


class Point(NamedTuple):
    """What lines are drawn through: milliseconds of a step over the number of elements."""

    elements: int
    ours: float
    peer: float


# The points of each line of ours and of the line beside it, by what they have in common, by panel.
Panels = Mapping[str, Mapping[str, Sequence[Point]]]


def times_of(comparisons: Sequence[Comparison]) -> dict[str, dict[str, float]]:
    """Milliseconds of the sides that were timed."""
    return {
        one.case.name: {row.side: 1e3 * row.seconds for row in one.rows if row.seconds is not None}
        for one in comparisons
    }


def digest(times: Times | Panels, title: str) -> str:
    """What a picture of these times carries: a picture is up to date if its file has it."""
    return hashlib.sha256(json.dumps([title, times]).encode()).hexdigest()


def save_bars(path: Path, times: Times, title: str) -> None:
    """Draw the times in units of that of a case's first side, in the format that the suffix of `path` names."""
    save(path, bars, times, title)


def save_lines(path: Path, panels: Panels, title: str) -> None:
    """Draw times over the number of elements, on logarithmic axes, in the format that the suffix of `path` names."""
    save(path, lines, panels, title)


def save(path: Path, draw: Callable[[Any, str], Figure], times: Times | Panels, title: str) -> None:
    """Draw a figure and write it."""
    import matplotlib

    # The same data gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "triton-optim", "svg.fonttype": "none"}):
        metadata = {"Title": f"data {digest(times, title)}"}
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
        draw(times, title).savefig(path, metadata={**metadata, **undated})


def bars(times: Times, title: str) -> Figure:
    """The figure of `save_bars`. What the names of all cases have in common stands above, once."""
    sides = list(dict.fromkeys(side for case in times.values() for side in case))
    colours = {side: OURS if side.startswith("ours") else PEERS[(i - 1) % len(PEERS)] for i, side in enumerate(sides)}
    height = sum(len(case) + 1 for case in times.values())
    figure = new_figure(8, max(2.0, 0.9 + 0.19 * height), dpi=150)
    axes = figure.subplots()
    shared, labels = told_apart(list(times))
    ticks: list[float] = []
    y = 0.0
    for case in times.values():
        ticks.append(y + (len(case) - 1) / 2)
        first, unit = next(iter(case.items()))
        for side, ms in case.items():
            axes.barh(y, ms / unit, height=0.9, color=colours[side])
            time = f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms" if ms >= 1 else f"{1e3 * ms:.3g} us"
            words = f"{side}: {time}" if side == first else f"{side}: {time}, {ms / unit:.2f} x"
            own: dict[str, Any] = {"color": OURS, "fontweight": "bold"} if side.startswith("ours") else {}
            axes.annotate(
                words, (ms / unit, y), (3, 0), textcoords="offset points", va="center", fontsize="x-small", **own
            )
            y += 1
        y += 1
    axes.axvline(1, color=OURS, linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, labels, fontsize="small")
    axes.set_ylim(y - 1.2, -0.8)
    axes.set_xlabel("times as long as the first bar of each")
    axes.set_xlim(0, 1.3 * max(ms / next(iter(case.values())) for case in times.values() for ms in case.values()))
    axes.set_title("\n".join(filter(None, (title, shared))), fontsize="medium")
    open_frame(axes)
    return figure


def told_apart(names: Sequence[str]) -> tuple[str, list[str]]:
    """What names have in common, of their parts between commas, and the rest of each, its first part on its own line.

    Example:
        >>> from triton_optim.bench.picture import told_apart
        >>> told_apart(["AdamW, gpt2, float32", "Lion, gpt2, float32"])
        ('gpt2, float32', ['AdamW', 'Lion'])
        >>> told_apart(["AdamW, gpt2, float32"])
        ('gpt2, float32', ['AdamW'])
    """
    every = [name.split(", ") for name in names]
    shared = [part for part in every[0][1:] if all(part in parts for parts in every)]
    rests = [[part for part in parts if part not in shared] for parts in every]
    return ", ".join(shared), ["\n".join(filter(None, (rest[0], ", ".join(rest[1:])))) for rest in rests]


def lines(panels: Panels, title: str) -> Figure:
    """The figure of `save_lines`."""
    figure = new_figure(9, 4.2, dpi=150)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, groups) in zip(every, panels.items(), strict=True):
        labels: list[float] = []
        for label, points in groups.items():
            pair(axes, label, points, labels)
        axes.set(xscale="log", yscale="log", xlabel="elements in all")
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.25)
        axes.margins(y=0.1)
        axes.yaxis.set_major_formatter(lambda ms, _: readable_milliseconds(ms))
    every[0].set_ylabel("a step")
    handles = every[0].get_lines()[:2]
    figure.legend(handles=handles, frameon=False, fontsize="small", ncols=2, loc="outside lower center")
    figure.suptitle(title, fontsize="medium")
    open_frame(*every)
    return figure


def pair(axes: Axes, label: str, points: Sequence[Point], labels: list[float]) -> None:
    """A line of ours, that of the peer, and the space between them.

    Args:
        labels: the heights of the labels so far, between lines; that of this one is added.
    """
    elements, ours, peers = zip(*points, strict=True)
    axes.plot(elements, ours, color=OURS, linewidth=1.8, marker=".", label="ours")
    axes.plot(elements, peers, color=PEERS[0], linewidth=1.2, marker=".", label="the fastest of torch's")
    axes.fill_between(elements, ours, peers, color=OURS, alpha=0.08, linewidth=0)
    below, above = sorted((ours[0], peers[0]))
    middle = (below * above) ** 0.5
    between = above > 2 * below and all(not 0.6 < middle / other < 1.6 for other in labels)  # there is room
    labels += [middle] * between
    place, shift, va = (middle, 0, "center") if between else (below, -5, "top")
    own: dict[str, Any] = {"textcoords": "offset points", "va": va, "fontsize": "small", "color": "#333333"}
    axes.annotate(label, (elements[0], place), (4, shift), **own)


def readable_milliseconds(ms: float) -> str:
    """Such as 10 us, 1 ms, 1 s."""
    unit, scale = ("us", 1e3) if ms < 0.99 else ("ms", 1.0) if ms < 990 else ("s", 1e-3)
    return f"{ms * scale:g} {unit}"
