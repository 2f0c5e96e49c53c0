"""Where the host time of a Triton step goes, line by line: ``python benchmarks/host_profile.py``.

Every step is interrupted once, at a random moment, and the line of the package that runs then is counted: no line is
slowed down to time it, and a call into C counts for the line that makes it. With no GPU the parameters are on the
CPU, and Triton's driver is one that launches nothing.
"""

from __future__ import annotations

import argparse
import linecache
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import triton_optim
from triton_optim.backends.triton import stub_driver
from triton_optim.bench.models import parameters, shapes
from triton_optim.util import gather

PACKAGE = str(Path(triton_optim.__file__).parent)


def give_new_gradients(params: Sequence[torch.Tensor]) -> None:
    """Gradients of the same values that are new objects at new addresses: the old ones live until all new ones do. What
    memory happens to hold will not do: numbers too small to be normal take a processor a hundred times as long.
    """
    fresh = [p.grad.clone() for p in params if p.grad is not None]
    for p, g in zip(params, fresh, strict=True):
        p.grad = g


class Sampler:
    """Interrupts a call at a random moment of `span` seconds and counts what it was doing."""

    def __init__(self, span: float) -> None:
        self.span = span
        self.lines: Counter[tuple[str, int, str]] = Counter()  # file, line, function
        signal.signal(signal.SIGALRM, self._count)

    def run(self, call: Callable[[], Any]) -> None:
        self.active = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, self.span))
        call()
        self.active = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _count(self, _: int, frame: FrameType | None) -> None:
        if not self.active:
            return
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            if frame.f_code is Sampler.run.__code__:
                self.lines["(torch's hooks around step)", 0, "step"] += 1
                return
            frame = frame.f_back
        if frame is not None:
            self.lines[frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_qualname] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="1000x1")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--lines", type=int, default=25, help="how many lines to print")
    arguments = parser.parse_args()

    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    else:
        stub_driver.install("sm_90")
        device = torch.device("cpu")
    params = list(parameters(shapes(arguments.model), device))
    optimizer = triton_optim.AdamW(params, backend="triton")
    times = []
    gather.library.load()  # as if training had gone on for a while
    for _ in range(200):
        give_new_gradients(params)
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    # A little longer than a step, so that its end is as likely to be met as its beginning.
    sampler = Sampler(1.5 * median)
    end = time.monotonic() + arguments.seconds
    while time.monotonic() < end:
        give_new_gradients(params)
        sampler.run(optimizer.step)

    total = sum(sampler.lines.values())
    print(f"{arguments.model}: {1e6 * median:.0f} us a step (median of {len(times)}), {total} samples on {device}\n")

    def show(count: int, what: str) -> None:
        print(f"{1e6 * median * count / total:7.1f} us {count / total:6.1%}  {what}")

    functions: Counter[str] = Counter()
    for (_, _, function), count in sampler.lines.items():
        functions[function.partition(".<locals>")[0]] += count
    for function, count in functions.most_common(12):
        show(count, function)
    print()
    for (file, line, _), count in sampler.lines.most_common(arguments.lines):
        place = f"{Path(file).name}:{line}" if line else file
        show(count, f"{place:26} {linecache.getline(file, line).strip()}")


if __name__ == "__main__":
    main()
