"""What the options of several commands share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path

from ..util.pictures import plot_formats


def check_files(plot: Path | None, json: Path | None) -> None:
    """Raise ValueError if what ``--plot`` and ``--json`` name cannot be written."""
    for option, path in (("--plot", plot), ("--json", json)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: the folder {path.parent} does not exist. Create it first.")
    if plot is not None and plot.suffix[1:].lower() not in plot_formats():
        raise ValueError(f"--plot {plot}: the suffix names no image format. Use .png, .pdf or .svg.")


def chosen(option: str, given: str, known: Iterable[str]) -> list[str]:
    """The names, comma-separated, that an option gives.

    Raises:
        ValueError: one of them is none of the `known` ones.
    """
    names, known = [name.strip() for name in given.split(",")], list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name}: there is none. Choose from {', '.join(known)}.")
    return names


def command_line(command: str, args: argparse.Namespace) -> str:
    """A command with its options, defaults too."""
    words = ["triton-optim", command]
    for option, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            if option not in ("command", "run") and one not in (None, "") and one is not False:
                words += [f"--{option}"] if one is True else [f"--{option}", str(one)]
    return shlex.join(words)
