"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never there in part, not even when this is interrupted."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, what: Any, allow_nan: bool = True) -> None:
    """Write JSON that people can read."""
    write_whole(path, json.dumps(what, indent=1, allow_nan=allow_nan) + "\n")
