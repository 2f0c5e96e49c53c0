"""Does the test suite notice a fault in the code?

Each mutant of `mutations/` is one edit that a tired person might make. It is made in a copy of the repository, in
which the tests that should notice it are run, after all of them have passed there without it: ``python
benchmarks/mutants.py --results benchmarks/results``. No GPU is needed; it takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mutations import MUTANTS, ROOT, Mutant, place_of

LIMIT = 600.0  # seconds
PASSED, FAILED = 0, 1  # of pytest's exit codes; the others say that no test was run


@dataclass(frozen=True)
class Outcome:
    """What came of tests.

    Attributes:
        verdict: "passed", "failed", "crashed", "timed out", or "broken" where none was run.
        test: the first that failed; empty for none.
        seconds: that it took.
    """

    verdict: str
    test: str
    seconds: float


class Copy:
    """A copy of the repository's files, those that are not committed yet too, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self.cache = folder / "copy", folder / "log", folder / "cache"
        self._written = time.time()
        self._kept: dict[Path, str] = {}
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).exists():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name, follow_symlinks=False)

    def write(self, mutant: Mutant, edited: bool) -> None:
        """Make the edit, or take it back."""
        own = self.root / place_of(mutant).relative_to(ROOT)
        text = self._kept.setdefault(own, own.read_text())  # as it was copied, whatever is edited meanwhile
        own.write_text(text.replace(mutant.old, mutant.new) if edited else text)
        # What Python has compiled is told from stale code by size and second.
        self._written += 2
        os.utime(own, (self._written, self._written))

    def test(self, tests: Sequence[str]) -> Outcome:
        """Run tests in the copy, up to the first that fails."""
        start = time.monotonic()
        # Forked, after torch was imported, which takes longer than most tests; Triton was not: tests say how it runs.
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(tests,))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]  # it was started
            process.join()
            return Outcome("timed out", "", LIMIT)
        said = self.log.read_text()
        if process.exitcode not in (PASSED, FAILED):
            print(said[-3000:])
            crashed = process.exitcode is not None and process.exitcode < 0
            return Outcome("crashed" if crashed else "broken", "", time.monotonic() - start)
        failed = [
            line.partition(" ")[2].partition(" - ")[0]
            for line in said.splitlines()
            if line.startswith(("FAILED ", "ERROR "))
        ]
        # What ends with an error, and no failed test, has shown nothing.
        verdict = "passed" if not process.exitcode else "failed" if failed else "broken"
        return Outcome(verdict, failed[0] if failed else "", time.monotonic() - start)

    def _run(self, tests: Sequence[str]) -> None:
        """In a process of its own."""
        os.setsid()
        os.chdir(self.root)
        os.environ |= {"PYTHONPATH": str(self.root), "TRITON_OPTIM_CACHE_DIR": str(self.cache)}
        sys.path.insert(0, str(self.root))
        with self.log.open("w") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        code = pytest.main(["-q", "-x", "-n0", "-rfE", "-p", "no:cacheprovider", *tests])
        imported = [*sys.modules["triton_optim"].__path__, *sys.modules["triton_optim.kernels"].__path__]
        if not all(Path(place).is_relative_to(self.root) for place in imported):
            print(f"{imported} were imported, and not the copy.")
            code = pytest.ExitCode.INTERNAL_ERROR
        sys.stdout.flush()
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="with this in their names; the others' results stay")
    parser.add_argument("--results", type=Path, help="folder for mutants.json; nothing is written without it")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if any(part in mutant.name for part in arguments.only)]
    outcomes = {} if arguments.results is None else read(arguments.results / "mutants.json")
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        without = copy.test(sorted({mutant.test for mutant in chosen}))
        if without.verdict != "passed":
            raise RuntimeError(f"{without.test or 'a test'} {without.verdict} without a mutant. Mend that first.")
        for mutant in chosen:
            copy.write(mutant, edited=True)
            outcomes[mutant] = copy.test([mutant.test])
            copy.write(mutant, edited=False)
            print(f"{mutant.name}: {outcomes[mutant].verdict} {outcomes[mutant].test}", flush=True)
    write({mutant: outcomes[mutant] for mutant in MUTANTS if mutant in outcomes}, arguments.results)


def read(path: Path) -> dict[Mutant, Outcome]:
    """The outcomes in a file of results."""
    records = {r["case"]: r["figures"] for r in json.loads(path.read_text())["records"]} if path.exists() else {}
    return {
        mutant: Outcome(*(records[mutant.name][name] for name in ("verdict", "test", "seconds")))
        for mutant in MUTANTS
        if mutant.name in records
    }


def write(outcomes: dict[Mutant, Outcome], folder: Path | None) -> None:
    """Print the score, write the results, and end with how many survived."""
    from triton_optim.bench.records import Record, write_records  # the copy's is imported in a process of its own

    said = {
        "failed": "killed by",
        "passed": "SURVIVED",
        "timed out": "killed: its test never ends",
        "crashed": "killed: its test crashes",
        "broken": "NO TEST RAN",
    }
    records = []
    for mutant, outcome in outcomes.items():
        figures = {"verdict": outcome.verdict, "test": outcome.test, "seconds": round(outcome.seconds, 1)}
        figures |= {"file": place_of(mutant).name, "matters": mutant.matters}
        text = f"{said[outcome.verdict]} {outcome.test}".strip()
        records.append(Record("mutants", mutant.name, text, figures))
    survived = [mutant.name for mutant, outcome in outcomes.items() if outcome.verdict in ("passed", "broken")]
    text = f"{len(outcomes) - len(survived)} of {len(outcomes)} killed"
    records.insert(0, Record("mutants", "all", text, {"survived": survived}, value=len(survived), target=0))
    print(records[0].line())
    if folder:
        write_records(folder, records, torch.device("cpu"))
    sys.exit(len(survived))


if __name__ == "__main__":
    main()
