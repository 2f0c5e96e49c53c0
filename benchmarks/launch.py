"""Does every step launch, with every Triton that is supported?

The launch tests with each of these versions, of which those that are not installed are fetched into a temporary folder:
``python benchmarks/launch.py --results benchmarks/results``. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import torch

from triton_optim.bench.records import Record, write_records

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_launch.py", "tests/test_edited_kernels.py", "tests/test_cuda_launcher.py")
VERSIONS = ("3.9.0", "3.8.0", "3.6.0", "3.4.0")


def run(triton: str, folder: Path) -> Record:
    """The launch tests with a version of Triton.

    Args:
        triton: the version.
        folder: for what is fetched and compiled.
    """
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    if triton != version("triton"):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "triton")]
        subprocess.run([*pip, f"triton=={triton}"], check=True)
        environment["PYTHONPATH"] = str(folder / "triton")
    return tested("launch", f"Triton {triton}", [sys.executable, "-n0", *TESTS], environment, folder)


def tested(topic: str, case: str, command: list[str], environment: dict[str, str], folder: Path) -> Record:
    """What came of tests.

    Args:
        topic: of the record.
        case: of the record.
        command: a Python interpreter, and pytest's arguments.
        environment: that they run in.
        folder: for pytest's report.
    """
    report = folder / "report.xml"
    python, *arguments = command
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    subprocess.run(pytest, cwd=ROOT, env=environment, check=False)
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    tests, failures, errors, skipped = (int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    figures = {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}
    text = ", ".join(f"{count} {what}" for what, count in figures.items())
    return Record(topic, case, text, figures, value=failed, target=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--triton", default=",".join(VERSIONS), help="versions, with commas (default %(default)s)")
    parser.add_argument("--results", type=Path, help="folder for launch.json; nothing is written without it")
    arguments = parser.parse_args()
    records = []
    for triton in arguments.triton.split(","):
        with tempfile.TemporaryDirectory() as folder:
            records.append(run(triton, Path(folder)))
        print(records[-1].line(), flush=True)
        if arguments.results:
            write_records(arguments.results, records, torch.device("cpu"))
    sys.exit(any(record.value for record in records))


if __name__ == "__main__":
    main()
