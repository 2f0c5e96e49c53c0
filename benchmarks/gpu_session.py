"""All that only a GPU can answer, in one call of less than ten minutes, most valuable first:

    benchmarks/gpu_session.py --seconds 560 --out results
    benchmarks/gpu_session.py --seconds 560 --out results --parts suite
    benchmarks/gpu_session.py --out rehearsal --rehearse    # without a GPU, small, into a stub driver

The folder gets two files. ``session.json`` is written anew after each part, with what the parts before found, so that a
session that is cut off counts; of a part that is stopped it has what was answered until then. ``session.log`` has all
output. A part that no longer fits is shortened or dropped, which the file says.

It needs torch, Triton and the packages of the `test` extra, and installs nothing. The exit status is 1 where a part
failed, was cut off or dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESERVE = 5.0  # seconds of the budget that are left for stopping the last part and writing
SHOWN = 12  # lines of each part's output that are printed, besides the log


@dataclass(frozen=True)
class Part:
    """One question.

    Attributes:
        name: of it.
        seconds: that it may take.
        least: seconds without which it is not begun.
        arguments: of Python; ``{out}`` is where it writes JSON: a file, or a folder for a benchmark.
        rehearsed: the same, small.
    """

    name: str
    seconds: float
    least: float
    arguments: tuple[str, ...]
    rehearsed: tuple[str, ...]


def benchmark(name: str, seconds: float, least: float, *tests: str, rehearsed: str = "") -> Part:
    """Benchmarks of this folder. In rehearsal `rehearsed`, or all."""
    command = ("-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider", "--results", "{out}")
    command += ("--benchmark-disable",)
    real = tuple(f"benchmarks/{test}" if test.startswith("test_") else test for test in tests)
    small = (f"benchmarks/{rehearsed}",) if rehearsed else real
    return Part(
        name,
        seconds,
        least,
        (*command, "--patience", "3", "--runs", "2", *real),
        (*command, "--patience", "0", "--runs", "1", *small),
    )


LAUNCH = ("-m", "triton_optim", "doctor", "--json", "{out}")
PARITY = ("benchmarks/parity.py", "--json", "{out}")
SUITE = ("-m", "pytest", "-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider")
BANDWIDTH, SMALL = "test_gpu_step.py::test_share_of_bandwidth", "test_gpu_step.py::test_small_tensors"
CODECS = "test_gpu_step.py::test_codecs_share_of_bandwidth"
COLD = "test_triton_cold_start.py"
OTHERS = (
    "test_models.py",
    "test_whole_step.py",
    "test_launches.py",
    "test_cold_start.py::test_first_step[1000x1k-gpu]",
)
PARTS = (
    Part("launch", 45, 10, LAUNCH, LAUNCH),
    Part("parity", 150, 20, PARITY, (*PARITY, "--rehearse", "--cases", "^(SGD, momentum|AdamW, amp)$")),
    benchmark("bandwidth", 60, 20, f"{BANDWIDTH}[AdamW]"),
    benchmark("small tensors", 30, 15, f"{SMALL}[AdamW]"),
    benchmark("host time", 60, 20, "test_host_time.py", rehearsed="test_host_time.py::test_host_time[10]"),
    benchmark("muon", 50, 20, "test_matrix_step.py::test_muon"),
    benchmark("compile times", 60, 20, COLD, rehearsed=f"{COLD}::test_first_launch[step-AdamW fp32]"),
    benchmark("codecs", 60, 20, CODECS, rehearsed=f"{CODECS}[fp32, int8 states]"),
    benchmark("optimizers", 60, 20, BANDWIDTH, SMALL, rehearsed=f"{BANDWIDTH}[SGD nesterov]"),
    benchmark("others", 60, 20, *OTHERS, rehearsed="test_launches.py"),
    Part("suite", 600, 60, (*SUITE, "-n", "8", "tests"), (*SUITE, "-n", "0", "tests/test_dispatch.py")),
)


class Session:
    """Runs parts and keeps the file.

    Args:
        out: the folder.
        seconds: for all of it.
        rehearses: without a GPU, small.
    """

    def __init__(self, out: Path, seconds: float, rehearses: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + seconds - RESERVE
        self.rehearses = rehearses
        self.path, self.log_path = out / "session.json", out / "session.log"
        self.found: dict[str, Any] = {"seconds": seconds, "rehearsal": rehearses, "parts": {}}
        self.environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        if rehearses:
            self.environment |= {"TRITON_OPTIM_REHEARSAL": "1", "OMP_NUM_THREADS": "1"}
        self.folder = ROOT
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, parts: list[Part]) -> bool:
        """Run them one after another. Returns whether all were done."""
        self.found["parts"] = {part.name: {"state": "waiting"} for part in parts}
        self.write()
        with tempfile.TemporaryDirectory() as scratch, self.log_path.open("wb") as log:
            self.find_package(Path(scratch))
            self.environment |= {
                "TRITON_CACHE_DIR": f"{scratch}/triton",
                "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
            }
            self.about(log)
            for number, part in enumerate(parts):
                self.found["parts"][part.name] = {"state": "cut off"}  # true if this session is killed meanwhile
                self.write()
                self.found["parts"][part.name] = found = self.run_part(part, Path(scratch) / f"part{number}", log)
                self.write()
                print(f"{part.name}: {found['state']}", flush=True)
                print("\n".join(f"    {line}" for line in found.get("last lines", [])), flush=True)
        return all(found["state"] == "done" for found in self.found["parts"].values())

    def find_package(self, scratch: Path) -> None:
        """Where the package is not installed, run in a copy of the checkout that has the kernels in it."""
        command = [sys.executable, "-c", "import triton_optim.kernels"]
        if subprocess.run(command, cwd=scratch, env=self.environment, capture_output=True, check=False).returncode:
            self.folder = scratch / "checkout"
            shutil.copytree(ROOT, self.folder, ignore=shutil.ignore_patterns(".git", "__pycache__"))
            shutil.copytree(ROOT / "kernels", self.folder / "triton_optim" / "kernels", dirs_exist_ok=True)
            paths = [str(self.folder), self.environment.get("PYTHONPATH", "")]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def about(self, log: Any) -> None:
        """What machine it is, into the log and the file."""
        for tool in ("nvidia-smi", "rocm-smi"):
            try:
                subprocess.run([tool], stdout=log, stderr=log, check=False, timeout=20)
            except (OSError, subprocess.TimeoutExpired) as error:
                log.write(f"{tool}: {error}\n".encode())
        code = (
            "import json, torch; from triton_optim.util.provenance import provenance as p; "
            "print(json.dumps(p(torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu'))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=log,
            check=False,
            timeout=60,
        )
        if done.returncode == 0:
            self.found |= json.loads(done.stdout.splitlines()[-1])

    def run_part(self, part: Part, out: Path, log: Any) -> dict[str, Any]:
        """What came of a part: its state, its times, its last lines and its JSON."""
        left = self.end - time.monotonic()
        limit = left if self.rehearses else min(part.seconds, left)  # a busy machine fails no rehearsal
        if limit < part.least:
            return {"state": "dropped", "why": f"{left:.0f} s were left; it needs {part.least:.0f} s"}
        arguments = part.rehearsed if self.rehearses else part.arguments
        command = [argument.replace("{out}", str(out)) for argument in arguments]
        log.write(f"\n=== {part.name}, {limit:.0f} s: {' '.join(command)}\n".encode())
        log.flush()
        begins, started = log.tell(), time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = self.process.wait(limit)
            state = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            self.stop()
            state = f"cut off after {limit:.0f} s"
        found = {"state": state, "seconds": time.monotonic() - started}
        if limit < part.seconds:
            found["shortened"] = f"to {limit:.0f} s of {part.seconds:.0f} s"
        log.seek(0, os.SEEK_END)
        with self.log_path.open("rb") as written:
            written.seek(begins)
            found["last lines"] = written.read().decode(errors="replace").splitlines()[-SHOWN:]
        return found | {"results": results(out)}

    def stop(self) -> None:
        """End the part that runs, and what it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def write(self) -> None:
        """The file as it is now. It is replaced, never half written."""
        unfinished = self.path.with_name("session.json.part")
        unfinished.write_text(json.dumps(self.found, indent=1) + "\n")
        unfinished.replace(self.path)


def results(out: Path) -> Any:
    """The JSON that a part wrote: of a file, or of each in a folder."""
    if out.is_dir():
        return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    return json.loads(out.read_text()) if out.exists() else None


def main() -> int:
    """Run the session."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0].rstrip(":"))
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder for the files (default: $OUT)")
    parser.add_argument("--seconds", type=float, default=560.0, help="for the whole session (default 560)")
    parser.add_argument("--parts", help=f"some of {', '.join(part.name for part in PARTS)} (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small, into a stub driver")
    args = parser.parse_args()
    if args.out is None:
        parser.error("no folder for the files. Give --out FOLDER or set $OUT.")
    names = args.parts.split(",") if args.parts else [part.name for part in PARTS]
    if unknown := set(names) - {part.name for part in PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}. There are {', '.join(part.name for part in PARTS)}.")
    session = Session(args.out, args.seconds, args.rehearse)

    def stopped(*_: Any) -> None:
        session.stop()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stopped)
    return 0 if session.run([part for part in PARTS if part.name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
