"""Timing on a machine that others use too: sides take turns, and rounds that were disturbed are run again.

A *run* is one call of a side. In a *pass* every side has a turn, in random order; a *round* is as many passes as it
takes to see what else the machine did meanwhile. The ratio of two sides is that of their medians over all kept runs.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROUND_SECONDS = 0.6  # /proc/stat counts in ticks of 10 ms: shorter, and their rounding looks like load
FOREIGN_LIMIT = 0.05  # of all cores
WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Side:
    """What is timed. `prepare` is called before every run, outside the time."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] | None = None


class Load:
    """CPU time that other programs use. `since_start` is None where there is no /proc/stat."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.busy, self.own = _busy_seconds(), _own_seconds()

    def since_start(self) -> float | None:
        """Cores in use by others, on average since this object was made."""
        busy, wall = _busy_seconds(), time.perf_counter() - self.start
        if busy is None or self.busy is None:
            return None
        return max(0.0, (busy - self.busy - (_own_seconds() - self.own)) / wall)


def _busy_seconds() -> float | None:
    """CPU time of the whole machine. Time stolen by the hypervisor counts: it was not ours."""
    try:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


class Patience:
    """Time that may be spent waiting for others and repeating what they disturbed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> bool:
        """Seconds that may still be waited."""
        return time.monotonic() < self.end

    def wait_until_quiet(self) -> None:
        """Return once nobody else uses the machine, or no time is left."""
        while self.left():
            load = Load()
            time.sleep(WAIT_SECONDS)
            if is_quiet(load.since_start()):
                return


def is_quiet(foreign: float | None) -> bool:
    """Whether others use little of the machine."""
    return foreign is None or foreign <= FOREIGN_LIMIT * (os.cpu_count() or 1)


@dataclass
class Measurement:
    """Seconds a run, by side, a list for each kept round."""

    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)  # cores busy with other programs in each kept round
    repeated: int = 0  # rounds thrown away
    disturbed: int = 0  # rounds kept although others were busy, because patience ran out

    def samples(self, side: str) -> list[float]:
        """The seconds of a side in all rounds."""
        return [sample for one in self.rounds for sample in one[side]]

    def median(self, side: str) -> float:
        """The median of a side in seconds."""
        return statistics.median(self.samples(side))

    def ratio(self, side: str, peer: str) -> float:
        """Median of `side` over the median of `peer`."""
        return self.median(side) / self.median(peer)

    def ratio_range(self, side: str, peer: str) -> tuple[float, float]:
        """Lowest and highest ratio of a single round."""
        ratios = [statistics.median(one[side]) / statistics.median(one[peer]) for one in self.rounds]
        return min(ratios), max(ratios)

    def compared(self, side: str, peers: Sequence[str]) -> tuple[dict[str, Any], str]:
        """`side` beside the fastest of `peers`: figures and words."""
        peer = min(peers, key=self.median)
        ratio, (low, high) = self.ratio(side, peer), self.ratio_range(side, peer)
        figures = {"peer": peer, "ratio": ratio, "lowest ratio": low, "highest ratio": high}
        return figures, f"{ratio:.3f} x {peer} ({low:.3f} to {high:.3f} by round)"

    def take(self, times: dict[str, list[float]], foreign: float | None, limit: Patience) -> bool:
        """Keep a round unless it was disturbed and there is time to repeat it. Returns whether it was kept."""
        if not is_quiet(foreign):
            if limit.left():
                self.repeated += 1
                return False
            self.disturbed += 1
        self.rounds.append(times)
        if foreign is not None:
            self.foreign.append(foreign)
        return True

    def quality(self) -> str:
        """How far to trust it, in words."""
        if not self.foreign:
            return f"{len(self.rounds)} rounds"
        text = f"{len(self.rounds)} rounds, {self.repeated} repeated, others used {max(self.foreign):.2f} cores at most"
        return f"{text}; {self.disturbed} DISTURBED" if self.disturbed else text


def measure(
    sides: Sequence[Side],
    patience: float,
    *,
    device: torch.device | str = "cpu",
    rounds: int = 10,
    turn: int = 1,
    inner: int = 1,
    warm_up: int = 2,
    advance: Callable[[], None] = lambda: None,
) -> Measurement:
    """Time the sides in turns.

    Args:
        sides: what to time.
        patience: seconds to spend beyond the rounds themselves, waiting for others and repeating disturbed rounds.
        device: on a GPU, time is taken by its events.
        rounds: how many undisturbed rounds to keep.
        turn: runs of a side before the next one's turn. With 1 each finds the caches full of what the others left, as
            after a backward pass; with more its own data stays there.
        inner: calls a run. On a GPU several in a row let the host run ahead, so that the device alone is timed.
        warm_up: passes before the first round.
        advance: called after every round that was kept.
    """
    clock = _event_seconds if torch.device(device).type != "cpu" else _wall_seconds
    shuffle = random.Random(0).shuffle
    order = list(sides)

    def one_pass(times: dict[str, list[float]]) -> None:
        shuffle(order)
        for side in order:
            for _ in range(turn):
                if side.prepare is not None:
                    side.prepare()
                times[side.name].append(clock(side.run, inner, device))

    def no_times() -> dict[str, list[float]]:
        return {side.name: [] for side in sides}

    for _ in range(warm_up):
        one_pass(no_times())

    result, limit = Measurement(), Patience(patience)
    while len(result.rounds) < rounds:
        limit.wait_until_quiet()
        times = no_times()
        gc.collect()
        gc.disable()
        try:
            load = Load()
            one_pass(times)
            while time.perf_counter() - load.start < ROUND_SECONDS:
                one_pass(times)
            foreign = load.since_start()
        finally:
            gc.enable()
        if result.take(times, foreign, limit):
            advance()
    return result


def measure_processes(run: Callable[[], Mapping[str, float]], patience: float, runs: int) -> Measurement:
    """As `measure`, for what happens once in a process: a round is one call of `run`, which returns its own seconds."""
    result, limit = Measurement(), Patience(patience)
    while len(result.rounds) < runs:
        limit.wait_until_quiet()
        load = Load()
        seconds = run()
        result.take({name: [value] for name, value in seconds.items()}, load.since_start(), limit)
    return result


def _wall_seconds(run: Callable[[], Any], inner: int, _: torch.device | str) -> float:
    start = time.perf_counter()
    for _call in range(inner):
        run()
    return (time.perf_counter() - start) / inner


def _event_seconds(run: Callable[[], Any], inner: int, device: torch.device | str) -> float:
    module = torch.get_device_module(device)
    start, end = (module.Event(enable_timing=True) for _ in range(2))
    module.synchronize()
    start.record()
    for _ in range(inner):
        run()
    end.record()
    module.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / inner
