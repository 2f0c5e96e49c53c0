"""What a race showed: who is best, by which settings, how fast."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..util.pictures import new_figure, open_frame
from ..util.table import readable_bytes, readable_seconds, table
from .names import require
from .records import DIVERGED, FINISHED, PRUNED, Record
from .task import Published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", ":", "-.")
MARKED = 12  # learning rates that have marks of their own
HEADER = ("optimizer", "schedule", "lr", "best loss", "last", "steps", "time", "step()", "all of it", "state")


@dataclass(frozen=True)
class Standing:
    """An optimizer under its best schedule and learning rate: of those with which no seed diverged, the ones with the
    lowest mean, over seeds, of the best validation loss.

    Attributes:
        optimizer, schedule, lr: which; without schedule and lr if with all of them a seed diverged.
        best, spread: the mean over seeds of the lowest validation loss, and its standard deviation; None with one seed.
        final: the mean of the last validation loss.
        steps_to_target, seconds_to_target: when the mean curve over seeds first is at the target; None if never.
        step_seconds, whole_seconds: medians over all steps of all seeds.
        state_bytes: bytes of all the optimizer keeps in the end.
        runs, diverged, pruned: of all the optimizer's runs, under any setting.
        edge: ``"smallest"`` or ``"largest"`` if the best learning rate is at that end of those tried: try beyond it.
        remarks: what is to be known of its settings, such as where they are from.
    """

    optimizer: str
    schedule: str | None = None
    lr: float | None = None
    best: float | None = None
    spread: float | None = None
    final: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None
    step_seconds: float | None = None
    whole_seconds: float | None = None
    state_bytes: int | None = None
    runs: int = 0
    diverged: int = 0
    pruned: int = 0
    edge: str | None = None
    remarks: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """What is to be known beside the numbers."""
        notes = [
            f"{n} of {self.runs} runs {what}"
            for n, what in ((self.diverged, "diverged"), (self.pruned, "were pruned"))
            if n
        ]
        if self.best is None:
            notes.append("no setting was finished by all seeds: try a smaller lr")
        if self.edge:
            notes.append(f"its best lr is the {self.edge} tried: try beyond it")
        return [*notes, *self.remarks]


class Beside(NamedTuple):
    """A published result; of the same runs here the mean of the last validation losses and their standard deviation."""

    published: Published
    final: float
    spread: float | None


class Configuration:
    """The finished runs of an optimizer, a schedule and a learning rate, a record for each seed."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.optimizer, self.schedule, self.lr = records[0].optimizer, records[0].schedule, records[0].lr
        self.best = statistics.fmean(record.best for record in records)
        self.judged_at = records[0].judged_at
        self.curve = [statistics.fmean(values) for values in zip(*(r.validation for r in records), strict=True)]
        self.seconds = [statistics.fmean(values) for values in zip(*(r.seconds for r in records), strict=True)]


class Results:
    """The outcome of a race; prints as a table.

    Attributes:
        task, steps, seeds, device: what was raced.
        records: of all runs.
        target: the validation loss to which the time is told. Where none was given, the worst of the optimizers' lowest
            mean losses, of those that came at least half of the way from the start to the best: all of these reach it.
        published: results that others published for the task.
    """

    def __init__(
        self,
        task: str,
        steps: int,
        seeds: int,
        device: str,
        records: Sequence[Record],
        target: float | None = None,
        remarks: Mapping[str, Sequence[str]] | None = None,
        published: Sequence[Published] = (),
    ) -> None:
        self.task, self.steps, self.seeds, self.device, self.records = task, steps, seeds, device, list(records)
        self.given_target, self.remarks, self.published = target, remarks or {}, published

    @cached_property
    def configurations(self) -> list[Configuration]:
        """All of which every seed finished."""
        grouped: dict[tuple[str, str, float], list[Record]] = {}
        for record in self.records:
            grouped.setdefault((record.optimizer, record.schedule, record.lr), []).append(record)
        finished = [[r for r in records if r.status == FINISHED] for records in grouped.values()]
        return [Configuration(records) for records in finished if len(records) == self.seeds]

    @cached_property
    def winners(self) -> dict[str, Configuration]:
        """The best configuration of each optimizer, by its label; the best optimizer first."""
        winners: dict[str, Configuration] = {}
        for c in sorted(self.configurations, key=lambda c: c.best):
            winners.setdefault(c.optimizer, c)
        return winners

    @cached_property
    def target(self) -> float | None:
        """See the class; None if no run finished."""
        if self.given_target is not None or not self.winners:
            return self.given_target
        start = max(c.curve[0] for c in self.winners.values())
        lowest = [min(c.curve) for c in self.winners.values()]
        return max(loss for loss in lowest if loss <= (start + min(lowest)) / 2)

    @cached_property
    def standings(self) -> list[Standing]:
        """The optimizers, best first; last those that diverged with every setting."""
        standings = [self.standing(optimizer) for optimizer in dict.fromkeys(r.optimizer for r in self.records)]
        return sorted(standings, key=lambda s: float("inf") if s.best is None else s.best)

    def standing(self, optimizer: str) -> Standing:
        """Where an optimizer stands."""
        own = [r for r in self.records if r.optimizer == optimizer]
        diverged, pruned = (sum(r.status == status for r in own) for status in (DIVERGED, PRUNED))
        winner, remarks = self.winners.get(optimizer), self.remarks.get(optimizer, ())
        if winner is None:
            return Standing(optimizer, runs=len(own), diverged=diverged, pruned=pruned, remarks=remarks)
        bests = [record.best for record in winner.records]
        reached = next(
            (i for i, loss in enumerate(winner.curve) if self.target is not None and loss <= self.target), None
        )
        tried = sorted({r.lr for r in own if r.schedule == winner.schedule})
        ends = {tried[0]: "smallest", tried[-1]: "largest"} if len(tried) > 1 else {}
        return Standing(
            optimizer=optimizer,
            schedule=winner.schedule,
            lr=winner.lr,
            best=winner.best,
            spread=statistics.stdev(bests) if len(bests) > 1 else None,
            final=winner.curve[-1],
            steps_to_target=None if reached is None else winner.judged_at[reached],
            seconds_to_target=None if reached is None else winner.seconds[reached],
            step_seconds=statistics.median(s for r in winner.records for s in r.step_seconds),
            whole_seconds=statistics.median(s for r in winner.records for s in r.whole_seconds),
            state_bytes=winner.records[0].state_bytes,
            edge=ends.get(winner.lr),
            remarks=remarks,
            runs=len(own),
            diverged=diverged,
            pruned=pruned,
        )

    @cached_property
    def beside(self) -> list[Beside]:
        """The published results whose runs were made here, too, by all seeds."""
        made = {(c.optimizer, c.schedule, c.lr): c for c in self.configurations}
        found = []
        for p in self.published:
            ours = made.get((p.optimizer, p.schedule, p.lr))
            if ours is not None:
                last = [record.validation[-1] for record in ours.records]
                found.append(Beside(p, statistics.fmean(last), statistics.stdev(last) if len(last) > 1 else None))
        return found

    @property
    def uneven_starts(self) -> list[int]:
        """Seeds with which not all runs had one loss before the first step: the task has other randomness."""
        starts: dict[int, set[float]] = {}
        for record in self.records:
            starts.setdefault(record.seed, set()).add(record.validation[0])
        return sorted(seed for seed, losses in starts.items() if len(losses) > 1)

    def figure(self) -> Figure:
        """One picture: losses over steps, over time and over learning rates, and learning rates over steps."""
        return draw(self)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "task": self.task,
            "steps": self.steps,
            "seeds": self.seeds,
            "device": self.device,
            "target": self.target,
            "standings": [asdict(standing) for standing in self.standings],
            "published": [{**b.published._asdict(), "ours": b.final, "our spread": b.spread} for b in self.beside],
            "runs": [asdict(record) for record in self.records],
        }

    def __repr__(self) -> str:
        notes = [f"{s.optimizer}: {note}" for s in self.standings for note in s.notes]
        return "\n".join([table(HEADER, [cells(s) for s in self.standings]), *notes, *beside_published(self)])


def beside_published(results: Results) -> list[str]:
    """Ours beside what was published, as a table with a heading; nothing where nothing was."""
    if not results.beside:
        return []
    rows = []
    for p, final, spread in results.beside:
        rows.append([p.optimizer, f"{p.lr:g}", with_spread(final, spread, 5), with_spread(p.final, p.spread, 5)])
    sources = dict.fromkeys(b.published.source for b in results.beside)
    header = ["last loss", "lr", "ours", "published"]
    return ["", table(header, rows), *(f"published: {source}" for source in sources)]


def with_spread(mean: float, spread: float | None, digits: int = 4) -> str:
    """A mean, and its standard deviation if there is one."""
    return f"{mean:.{digits}g}" + ("" if spread is None else f" ± {spread:.{digits - 3}g}")


def cells(s: Standing) -> list[str]:
    """The cells of a row, under `HEADER`; a dash is what there is not."""
    return [
        s.optimizer,
        s.schedule or "-",
        "-" if s.lr is None else f"{s.lr:g}",
        "-" if s.best is None else with_spread(s.best, s.spread),
        "-" if s.final is None else f"{s.final:.4g}",
        "-" if s.steps_to_target is None else f"{s.steps_to_target}",
        readable_seconds(s.seconds_to_target),
        readable_seconds(s.step_seconds),
        readable_seconds(s.whole_seconds),
        readable_bytes(s.state_bytes),
    ]


def draw(results: Results) -> Figure:
    """Draw losses over steps and over time (each optimizer at its best, with bands from the lowest to the highest
    seed), best losses over learning rates with what diverged and what was pruned, and learning rates over steps.
    """
    require(["matplotlib"], "The picture")
    figure = new_figure(12, 8.5, dpi=120)
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
    bands = f"; bands: lowest to highest of {results.seeds} seeds" if results.seeds > 1 else ""
    by_step.set(xlabel="optimizer steps", title=f"loss{bands}")
    by_time.set(xlabel="seconds of training", title="loss over time, without validation")
    by_lr.set(yscale="log", xlabel="learning rate", ylabel="best validation loss", title="sensitivity")
    rates.set(yscale="log", xlabel="optimizer steps", ylabel="learning rate", title="learning rates of the best")
    if results.winners:
        rates.set_ylim(bottom=max(rate for w in results.winners.values() for rate in w.records[0].lrs) / 1000)
    for axes in (by_step, by_time, by_lr, rates):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize="small")
    open_frame(by_step, by_time, by_lr, rates)
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
