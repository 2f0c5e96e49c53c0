"""The picture of a race: four panels, a colour for each optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .names import require
from .records import DIVERGED, PRUNED
from .results import Configuration, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", ":", "-.")
MARKED = 12  # learning rates that have marks of their own


def draw(results: Results) -> Figure:
    """Draw losses over steps and over time (each optimizer at its best, with bands from the lowest to the highest
    seed), best losses over learning rates with what diverged and what was pruned, and learning rates over steps.
    """
    require(["matplotlib"], "The picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would choose a window system and keep the figure for ever
    (by_step, by_time), (by_lr, rates) = figure.subplots(2, 2)
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(r.optimizer for r in results.records))}
    for optimizer, winner in results.winners.items():
        label = f"{optimizer}, {winner.schedule}, lr {winner.lr:g}"
        draw_losses(by_step, winner.judged_at, winner, colours[optimizer], label)
        draw_losses(by_time, winner.seconds, winner, colours[optimizer], label)
        rates.plot(winner.records[0].lrs, color=colours[optimizer], label=label)
    for axes in (by_step, by_time):
        axes.set(yscale="log", ylabel="validation loss")
        if results.target is not None:
            axes.axhline(
                results.target, color="0.5", linewidth=0.8, linestyle=":", label=f"target {results.target:.4g}"
            )
    draw_learning_rates(by_lr, results, colours)
    by_step.set(xlabel="optimizer steps", title=f"loss; bands: lowest to highest of {results.seeds} seeds")
    by_time.set(xlabel="seconds of training", title="loss over time, without validation")
    by_lr.set(yscale="log", xlabel="learning rate", ylabel="best validation loss", title="sensitivity")
    rates.set(yscale="log", xlabel="optimizer steps", ylabel="learning rate", title="learning rates of the best")
    if results.winners:
        rates.set_ylim(bottom=max(rate for w in results.winners.values() for rate in w.records[0].lrs) / 1000)
    for axes in (by_step, by_time, by_lr, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize="small")
    figure.suptitle(f"{results.task}: {results.steps} steps, {results.seeds} seeds, {results.device}")
    return figure


def draw_losses(axes: Axes, x: list[int] | list[float], winner: Configuration, colour: str, label: str) -> None:
    """The mean curve over seeds, and a band from the lowest seed to the highest."""
    at_each = list(zip(*(record.validation for record in winner.records), strict=True))
    axes.plot(x, winner.curve, color=colour, label=label)
    axes.fill_between(x, [min(v) for v in at_each], [max(v) for v in at_each], color=colour, alpha=0.2, linewidth=0)


def draw_learning_rates(axes: Axes, results: Results, colours: dict[str, str]) -> None:
    """Each run's best loss over its learning rate, means joined; above them crosses where runs diverged."""
    schedules = list(dict.fromkeys(r.schedule for r in results.records))
    styles = {schedule: LINES[i % len(LINES)] for i, schedule in enumerate(schedules)}
    for optimizer, colour in colours.items():
        for schedule in schedules:
            found = sorted(
                (c.lr, c.best) for c in results.configurations if (c.optimizer, c.schedule) == (optimizer, schedule)
            )
            axes.plot([lr for lr, _ in found], [best for _, best in found], styles[schedule], color=colour)
    tried = sorted({record.lr for record in results.records})
    axes.set_xscale("log")  # first, as it sets marks of its own
    if len(tried) <= MARKED:
        axes.set_xticks(tried, [f"{lr:g}" for lr in tried], rotation=45)
        axes.set_xticks([], minor=True)
    top = max((record.validation[0] for record in results.records), default=1.0)
    for record in results.records:
        marker, height = ".", record.best
        if record.status == DIVERGED:
            marker, height = "x", top * 1.3
        elif record.status == PRUNED:
            marker = "v"
        axes.plot(record.lr, height, marker, color=colours[record.optimizer], alpha=0.6, markersize=5)
    for optimizer, colour in colours.items():
        axes.plot([], [], color=colour, label=optimizer)
    for schedule in schedules:
        axes.plot([], [], styles[schedule], color="0.4", label=schedule)
    for status, marker, meaning in ((DIVERGED, "x", "diverged"), (PRUNED, "v", "pruned")):
        if any(record.status == status for record in results.records):
            axes.plot([], [], marker, color="0.4", label=meaning)
