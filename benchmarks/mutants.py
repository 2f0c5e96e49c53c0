"""Does the test suite notice a fault in the code?

Each mutant of `mutations.py` is one edit that a tired person might make. It is made in a copy of the repository, in
which the tests that should notice it are run, after they have passed there without it: ``python benchmarks/mutants.py
--results benchmarks/results``. No GPU is needed; all of them take about half an hour of one core.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from mutations import MUTANTS, ROOT, Mutant, place_of

from triton_optim.bench.records import Record, write_records

SHOW = "import triton_optim as to, triton_optim.kernels as k; print(*to.__path__, *k.__path__, sep='\\n')"
PASSED, FAILED = 0, 1  # of pytest's exit codes; the others say that no test was run


@dataclass(frozen=True)
class Outcome:
    """What came of tests.

    Attributes:
        verdict: "passed", "failed" or "timed out".
        test: the first that failed; empty for none.
        seconds: that it took.
    """

    verdict: str
    test: str
    seconds: float


class Copy:
    """A copy of the repository's files, those that are not committed yet too, in a folder of its own."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.root = folder / "copy"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).exists():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        # Where the installed package is a mapping of names to folders, it would find triton_optim.kernels there.
        if not (self.root / "triton_optim/kernels").exists():
            (self.root / "triton_optim/kernels").symlink_to("../kernels")
        # Compiled files are told from stale ones by size and second, which a mutant may share with its original.
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRITON_OPTIM_CACHE_DIR": str(cache),
        }

    def check(self) -> None:
        """Raise RuntimeError where Python would import another triton_optim than the copy's."""
        show = [sys.executable, "-c", SHOW]
        found = subprocess.run(show, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        if not all(Path(place).is_relative_to(self.root) for place in found.stdout.split()):
            raise RuntimeError(f"{found.stdout.split()} would be imported, and not what is in {self.root}.")

    def write(self, mutant: Mutant, edited: bool) -> None:
        """Make the edit, or take it back."""
        place = place_of(mutant)
        text = place.read_text()
        (self.root / place.relative_to(ROOT)).write_text(text.replace(mutant.old, mutant.new) if edited else text)

    def test(self, arguments: str, limit: float) -> Outcome:
        """Run tests in the copy, up to the first that fails.

        Args:
            arguments: pytest's.
            limit: seconds.
        """
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-rf", "-p", "no:cacheprovider"]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, *shlex.split(arguments)],
                cwd=self.root,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome("timed out", "", limit)
        if done.returncode not in (PASSED, FAILED):
            raise RuntimeError(f"pytest {arguments} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        verdict = "failed" if done.returncode else "passed"
        return Outcome(verdict, failed[0] if failed else "", time.monotonic() - start)


def record_of(mutant: Mutant, outcome: Outcome) -> Record:
    """What came of a mutant."""
    said = {"failed": f"killed by {outcome.test}", "passed": "SURVIVED", "timed out": "killed: the tests never end"}
    figures = {"verdict": outcome.verdict, "test": outcome.test, "seconds": round(outcome.seconds, 1)}
    figures |= {"file": place_of(mutant).name, "matters": mutant.matters}
    return Record("mutants", mutant.name, said[outcome.verdict], figures)


def score(records: list[Record]) -> Record:
    """How many survived."""
    survived = [record.case for record in records if record.figures["verdict"] == "passed"]
    text = f"{len(records) - len(survived)} of {len(records)} killed"
    return Record("mutants", "all", text, {"survived": survived}, value=len(survived), target=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="those with this in their names")
    parser.add_argument("--results", type=Path, help="folder for mutants.json; nothing is written without it")
    arguments = parser.parse_args()
    records: list[Record] = []
    sound: dict[str, float] = {}  # tests that pass without a mutant, and how long they take
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder), Path(folder) / "cache")
        copy.check()
        for mutant in MUTANTS:
            if arguments.only not in mutant.name:
                continue
            if mutant.tests not in sound:
                without = copy.test(mutant.tests, limit=600)
                if without.verdict != "passed":
                    raise RuntimeError(f"{mutant.tests} {without.verdict} without a mutant: {without.test}")
                sound[mutant.tests] = without.seconds
            copy.write(mutant, edited=True)
            outcome = copy.test(mutant.tests, limit=60 + 5 * sound[mutant.tests])
            copy.write(mutant, edited=False)
            records.append(record_of(mutant, outcome))
            print(f"{records[-1].line()} ({outcome.seconds:.0f} s)", flush=True)
    records.append(score(records))
    print(records[-1].line())
    if arguments.results:
        write_records(arguments.results, records, torch.device("cpu"))
    sys.exit(bool(records[-1].value))


if __name__ == "__main__":
    main()
