"""How commands look: tables and a progress bar in a terminal, plain text where piped."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description:<43}")
    columns = (SpinnerColumn("line"), description, BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def new_table(*headings: str) -> Table:
    """A table without vertical lines; the first column is text, the others are figures."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table
