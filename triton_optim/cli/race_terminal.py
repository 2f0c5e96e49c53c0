"""How `triton-optim race` looks: a bar for each optimizer while it runs, and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from ..race import Record, Results, Watcher
from ..race.records import FINISHED, Run
from ..race.results import HEADER, beside_published, cells
from .terminal import PIPED_WIDTH, say

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.progress import TaskID

LEFT_OUT = ("last", "all of it")  # in a narrow terminal


class Board(Watcher):
    """A bar for each optimizer, with its best loss so far, and one for the run in progress.

    Where the output is piped, it is a line for each run instead.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.bars: dict[str, TaskID] = {}
        self.best: dict[str, float] = {}
        self.current = self.progress.add_task("preparing", total=None, loss="")

    def __enter__(self) -> Board:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def planned(self, runs: Mapping[str, int]) -> None:
        """A bar for each."""
        self.bars = {label: self.progress.add_task(label, total=count, loss="") for label, count in runs.items()}

    def started(self, run: Run, steps: int) -> None:
        """The current bar from 0 on."""
        self.progress.reset(self.current, total=steps, description=str(run), loss="")

    def judged(self, run: Run, step: int, loss: float) -> None:
        """The current bar, and its loss."""
        self.progress.update(self.current, completed=step, loss=f"{loss:.4g}")

    def ended(self, run: Run, record: Record, again: bool) -> None:
        """One more on the optimizer's bar."""
        label = run.contestant.label
        if record.status == FINISHED:
            self.best[label] = min(self.best.get(label, record.best), record.best)
        best = f"best {self.best[label]:.4g}" if label in self.best else ""
        self.progress.update(self.bars[label], advance=1, loss=best)
        if not self.console.is_terminal:
            outcome = f"{record.best:.4g}" if record.status == FINISHED else record.status
            say(self.console, f"{run}: {outcome}{', kept from before' if again else ''}")

    def skipped(self, label: str, runs: int) -> None:
        """Made elsewhere: they count as done."""
        self.progress.update(self.bars[label], advance=runs)


def print_results(console: Console, results: Results) -> None:
    """The table, best first, and what its columns mean."""
    from rich import box
    from rich.table import Table

    say(console, f"\n{results.task}: {results.steps} steps, {results.seeds} seeds, on {results.device}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="", padding=(0, 1, 0, 0))
    shown = [i for i, heading in enumerate(HEADER) if console.width >= PIPED_WIDTH or heading not in LEFT_OUT]
    for i in shown:
        justify: JustifyMethod = "right" if i > 1 else "left"
        table.add_column(HEADER[i], justify=justify, overflow="fold", no_wrap=i > 0, min_width=12 if i == 0 else None)
    for standing in results.standings:
        row = cells(standing)
        table.add_row(*(row[i] for i in shown), style="dim" if standing.best is None else None)
    console.print(table)
    say(console, "best loss: the lowest on validation, mean over seeds ± standard deviation")
    if results.target is not None:
        say(console, f"steps, time: of training without validation, until the mean curve is at {results.target:.4g},")
        say(console, "which was asked" if results.given_target is not None else "the lowest that all who learn reach")
    for standing in results.standings:
        for note in standing.notes:
            say(console, f"{standing.optimizer}: {note}")
    for line in beside_published(results):
        say(console, line)
    if results.uneven_starts:
        seeds = ", ".join(map(str, results.uneven_starts))
        say(
            console,
            f"The loss before the first step differed among runs of seed {seeds}: the task has randomness that "
            "torch.manual_seed does not reach, so this is no fair race.",
            style="bold red",
        )
