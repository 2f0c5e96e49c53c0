"""Plain-text tables, and numbers as people read them."""

from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; numbers to the right.

    Example:
        >>> print(table(["name", "n"], [["a", "10"], ["bc", "9"]]))
        name   n
        ----  --
        a     10
        bc     9
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numeric = [bool(rows) and all(row[i][:1].isdigit() or row[i] == "-" for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        columns = zip(cells, widths, numeric, strict=True)
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in columns).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def readable_seconds(seconds: float | None) -> str:
    """Seconds with the unit that fits."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{three_digits(seconds * 1e6)} us"
    return f"{three_digits(seconds * 1e3)} ms" if seconds < 1 else f"{three_digits(seconds)} s"


def readable_bytes(count: int | None) -> str:
    """Bytes with the unit that fits."""
    if count is None:
        return "-"
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{three_digits(size)} {unit}"


def three_digits(number: float) -> str:
    """Three digits of a number, and more of one above 1,000."""
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


def short(value: Any) -> str:
    """A value, such as a dtype, without ``torch.``."""
    return str(value).removeprefix("torch.")
