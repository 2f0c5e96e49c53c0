"""Plain-text tables, for what the core prints without any other package."""

from collections.abc import Sequence


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
