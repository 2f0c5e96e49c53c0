"""How `triton-optim demo` looks: tables and a progress bar in a terminal, plain text where piped."""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING

from .demo_training import TIMED, TRAININGS, StepTimes, Training, ratios_to_fused

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from triton_optim.core.explain import Explanation

PIPED_WIDTH = 100


def open_console() -> Console:
    """Without a terminal rich would fold lines at 80 columns; with one it knows the width itself."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints text as it is: no markup, and no folding, which would break paths and tables."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A bar that leaves no trace, and none at all where the output is piped."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        SpinnerColumn("line"),
        TextColumn("{task.description:<43}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def new_table(*headings: str) -> Table:
    """A table without vertical lines; the first column is text, the others are figures."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def print_trainings(console: Console, trainings: dict[str, Training], differences: dict[str, float]) -> None:
    """`differences` has the largest difference of the loss curve from "torch", for the other trainings."""
    say(console, "\nTrainings from the same weights, on the same batches", style="bold")
    table = new_table("optimizer", "accuracy", "last loss", "loss differs by", "first step", "total")
    for name, training in trainings.items():
        table.add_row(
            TRAININGS[name][0],
            f"{training.accuracy:.2%}",
            f"{training.losses[-1]:.2e}",
            f"{differences[name]:.1e}" if name in differences else "-",
            readable_seconds(training.first_step_seconds),
            readable_seconds(training.seconds),
        )
    console.print(table)
    ours, noise = differences["ours"], differences["torch_fused"]
    say(
        console,
        f"The loss curves of triton_optim and torch differ by at most {ours:.1e}; torch's default and\n"
        f"torch's fused, which do the same sums in another order, by {noise:.1e}.",
    )


def print_step_times(console: Console, times: StepTimes) -> None:
    """Print the time of a step of each optimizer."""
    rounds = len(times.seconds["ours"])
    say(console, "\nTime of optimizer.step() on this network", style="bold")
    table = new_table("AdamW", "median", "x torch fused")
    for name, ratio in ratios_to_fused(times).items():
        median = readable_seconds(statistics.median(times.seconds[name]))
        table.add_row(TIMED[name][0], median, f"{ratio:.2f}")
    console.print(table)
    say(
        console,
        f"{times.tensors} tensors, {times.elements:,} parameters; {rounds} steps of each, taking turns, "
        "after a real backward pass",
    )


def print_dispatch(console: Console, explanation: Explanation) -> None:
    """The table of `explain`, with its two wide columns as lines under it so that it fits 100 columns."""
    say(console, "\nWhat was dispatched where: triton_optim.explain(optimizer)", style="bold")
    table = new_table("backend", "device", "tensors", "elements", "launches a step", "bytes a parameter")
    for bucket in explanation:
        table.add_row(
            bucket.backend,
            str(bucket.device),
            f"{bucket.tensors:,}",
            f"{bucket.elements:,}",
            f"{bucket.launches:,}",
            f"{bucket.bytes_per_parameter:g}",
        )
    console.print(table)
    for bucket in explanation:
        say(console, f"{bucket.backend}: {bucket.reason}")
        say(console, ", ".join(f"{role} {str(dtype).removeprefix('torch.')}" for role, dtype in bucket.dtypes.items()))


def readable_seconds(seconds: float) -> str:
    """Seconds with a unit that suits their size."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
