"""The picture that `triton-optim demo` leaves behind: the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TORCH_COLOUR, OURS_COLOUR, NOISE_COLOUR = "#d95f02", "#1b6ca8", "#8a8a8a"


def save_plot(path: Path, curves: dict[str, list[float]], title: str) -> None:
    """Draws the loss curves of "torch" and "ours", and how far "ours" and "torch_fused" are from "torch".

    Writes the format that the suffix of `path` names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would choose a window system and keep the figure for ever
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = range(1, len(curves["torch"]) + 1)

    above.plot(steps, curves["torch"], color=TORCH_COLOUR, linewidth=3.5, alpha=0.55, label="torch.optim.AdamW")
    above.plot(steps, curves["ours"], color=OURS_COLOUR, linewidth=1.0, label="triton_optim.AdamW")
    above.set_yscale("log")
    above.set_ylabel("training loss of the batch")
    above.set_title(title)
    above.legend(frameon=False)

    plot_difference(
        below,
        "torch.optim.AdamW(fused=True): rounding noise",
        NOISE_COLOUR,
        curves["torch"],
        curves["torch_fused"],
    )
    plot_difference(below, "triton_optim.AdamW", OURS_COLOUR, curves["torch"], curves["ours"])
    below.set_yscale("log")
    below.set_ylabel("|loss - torch's loss|")
    below.set_xlabel("optimizer step")
    below.set_title("how far the losses are apart; no dot: equal to the last bit", fontsize="medium")
    below.legend(frameon=False, fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_difference(axes: Axes, label: str, colour: str, reference: list[float], other: list[float]) -> None:
    """Draws dots without lines: a difference of exactly 0 has no place on a log axis."""
    difference = [abs(a - b) or float("nan") for a, b in zip(reference, other, strict=True)]
    steps = range(1, len(difference) + 1)
    axes.plot(steps, difference, color=colour, linestyle="none", marker=".", markersize=4, label=label)


def plot_formats() -> list[str]:
    """The suffixes, without the dot, that matplotlib can write with no window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return sorted(FigureCanvasAgg.get_supported_filetypes())
