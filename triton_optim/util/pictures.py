"""What all pictures share."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the parts of a bar: weights and gradients grey, states in colours.
PARTS = ("#4d4d4d", "#b0b0b0", "#1b6ca8", "#7fb2d9", "#d95f02", "#f2b27a", "#5aae8b", "#9b6fb0")


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """A figure of so many inches. No pyplot: it would choose a window system and keep the figure for ever."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def open_frame(*axes: Axes) -> None:
    """Without the lines above and to the right."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)


def stacked_bars(axes: Axes, bars: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """A horizontal bar for each label, of parts beside each other, with its sum.

    Args:
        bars: sizes by part, by label; the first is on top.
        unit: of the sizes.
    """
    parts = list(dict.fromkeys(part for own in bars.values() for part in own))
    colours = dict(zip(parts, cycle(PARTS), strict=False))
    longest = max((sum(own.values()) for own in bars.values()), default=1.0)
    for y, own in enumerate(bars.values()):
        start = 0.0
        for part, size in own.items():
            axes.barh(y, size, left=start, height=0.7, color=colours[part], edgecolor="white", linewidth=0.5)
            start += size
        axes.annotate(f"{start:.3g}", (start, y), (4, 0), textcoords="offset points", va="center", fontsize="small")
    for part in parts:
        axes.barh(0, 0, color=colours[part], label=part)
    axes.set_yticks(range(len(bars)), list(bars), fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.1 * longest))
    axes.legend(
        frameon=False, fontsize="small", ncols=min(len(parts), 4), loc="upper center", bbox_to_anchor=(0.5, -0.25)
    )
    open_frame(axes)


def plot_formats() -> list[str]:
    """The suffixes, without the dot, that matplotlib can write with no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return sorted(FigureCanvasAgg.get_supported_filetypes())
