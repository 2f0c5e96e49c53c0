"""Does the test suite pass with other releases of torch?

The whole suite, or tests that are named, with the Python that runs this and its torch: ``.ci/newest.sh`` makes an
environment of the newest torch and asks for it there, ``.ci/package.sh`` ones of other Pythons. No GPU is needed.
Results of other environments stay in the file, each with its date and commit.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from launch import tested

from triton_optim.bench.records import source, with_others, write_file

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_OPTIM_CACHE_DIR")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", nargs="*", help="some tests instead of all, and options of pytest after --")
    parser.add_argument("--results", type=Path, help="folder for suite.json; nothing is written without it")
    parser.add_argument("--commit", default=source(), help="of what is installed, where it is no checkout")
    arguments = parser.parse_args()
    case = f"Python {platform.python_version()}, torch {torch.__version__}, Triton {version('triton')}"
    case += ", some tests" if arguments.tests else ""
    print(case, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / name) for name in CACHES}
        record = tested("suite", case, [sys.executable, *arguments.tests], os.environ | caches, Path(folder))
    record = replace(record, text=f"{record.text}; {date.today()}, commit {arguments.commit}")
    print(record.line(), flush=True)
    if arguments.results:
        file = arguments.results / "suite.json"
        records, earlier = with_others(file, [record])
        records.sort(key=lambda one: one.case)
        write_file(file, "suite", records, torch.device("cpu"), source=arguments.commit, **earlier)
    sys.exit(bool(record.value))


if __name__ == "__main__":
    main()
