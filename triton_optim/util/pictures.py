"""What all pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def plot_formats() -> list[str]:
    """The suffixes, without the dot, that matplotlib can write with no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return sorted(FigureCanvasAgg.get_supported_filetypes())
