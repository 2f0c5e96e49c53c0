"""How long a step would take on a GPU that is not here: four limits, from what was compiled and from datasheets.

The multi-tensor kernel moves each byte once and does a little arithmetic in between, so its time is the longest of

- *memory*: bytes over the bandwidth that a copy reaches;
- *issue*: instructions of the full-chunk branch, over what all schedulers issue;
- *latency*: a program reads its tables, waits for its elements and computes, and only so many are resident. Little's
  law: with n resident, each for t seconds, n / t end in a second;

and, added to it, the *ends* of each launch: until it starts, and until the first program has ended where the last ones
leave units idle. A step that sums over parameters before its rule runs is two such passes.

What it leaves out: caches (what fits into L2 is faster than memory, in a benchmark's loop above all), units that are
narrower than the issue rate (square roots, divisions, float64, conversions), bank and channel conflicts, lower clocks
under load, and the time of the host, which can be the longest where tensors are many (`benchmarks/test_host_time.py`).
On AMD scalar instructions count as vector ones, which they run beside. Where memory is the limit, expect it to be as
good as the share of bandwidth that is assumed; where issue or latency is, take it as the least that the step takes. It
has not been compared with a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .gpus import SCHEDULERS, Gpu

# Assumed of all: seconds that a load takes from memory that is in use, and from a cache; and from the start of one
# launch to that of the next, where nothing else is in the way.
MEMORY_LATENCY, CACHE_LATENCY, LAUNCH = 0.8e-6, 0.3e-6, 3e-6
# Loads that wait for each other before the first element can be asked for: the chunk, the gradient's address, the
# tensor's entry.
TABLE_READS = 3

LIMITS = {"memory": "memory", "issue": "instruction issue", "latency": "latency", "ends": "launches and tails"}


class Kernel(NamedTuple):
    """What is asked of a compiled kernel; see :class:`triton_optim.audit.measure.Measurement`.

    Attributes:
        registers: a thread.
        num_warps, block, shared_bytes: a program.
        loaded, stored, instructions: an element; instructions are those of a thread.
    """

    registers: int
    num_warps: int
    block: int
    shared_bytes: int
    loaded: float
    stored: float
    instructions: float


class Estimate(NamedTuple):
    """Seconds of a step, and what they follow from.

    Attributes:
        at_peak: bytes over the datasheet's bandwidth.
        memory, issue, latency, ends: see the top of the file.
        total: of the step.
        launches: a step.
        programs: of all launches together.
        waves: times that all resident programs end.
        tail: share of the last wave that is empty.
        warps, most_warps: resident on a unit, and how many could be.
        in_flight, needed: bytes that resident programs load on a unit, and that Little's law asks for.
    """

    at_peak: float
    memory: float
    issue: float
    latency: float
    ends: float
    total: float
    launches: int
    programs: int
    waves: float
    tail: float
    warps: int
    most_warps: int
    in_flight: float
    needed: float

    @property
    def limit(self) -> str:
        """The largest part, in words."""
        return LIMITS[max(LIMITS, key=lambda name: getattr(self, name))]


def chunks(numels: Sequence[int], block: int) -> int:
    """Programs of an update: one for each chunk of each tensor.

    Example:
        >>> chunks([1024, 1025, 0], 1024)
        3
    """
    return sum(-(-numel // block) for numel in numels)


def resident_programs(gpu: Gpu, kernel: Kernel) -> int:
    """How many programs a unit holds at once."""
    unit = gpu.unit
    registers = -(-kernel.registers // unit.register_step) * unit.register_step
    warps = SCHEDULERS * min(unit.warps, unit.registers // registers)
    by_memory = unit.shared_memory // max(kernel.shared_bytes + unit.reserved, 1)
    return max(1, min(warps // kernel.num_warps, unit.programs, by_memory))


def issue_seconds(gpu: Gpu, kernel: Kernel, programs: int, schedulers: int) -> float:
    """In which so many schedulers issue the instructions of `programs`."""
    instructions = kernel.instructions * kernel.block / gpu.unit.warp_size
    return programs * instructions * gpu.unit.cycles / (schedulers * gpu.clock)


def lifetime(gpu: Gpu, kernel: Kernel) -> float:
    """Seconds of a program that is alone on its unit."""
    own = issue_seconds(gpu, kernel, 1, min(kernel.num_warps, SCHEDULERS))
    return TABLE_READS * CACHE_LATENCY + MEMORY_LATENCY + own


def estimate(gpu: Gpu, kernel: Kernel, numels: Sequence[int], launches: int = 1, norm_bytes: float = 0.0) -> Estimate:
    """The time of a step.

    Args:
        kernel: of the update.
        numels: elements of each tensor.
        launches: of the update, one a bucket.
        norm_bytes: bytes an element that are read before, for the norm of all gradients; 0 where there is no norm. The
            pass counts by its bytes and its two launches alone.
    """
    elements, programs = sum(numels), chunks(numels, kernel.block)
    moved = elements * (kernel.loaded + kernel.stored + norm_bytes)
    resident = resident_programs(gpu, kernel)
    waves = programs / (gpu.units * resident)
    achieved = gpu.bandwidth * gpu.share
    launches += 2 * (norm_bytes > 0)
    alive = lifetime(gpu, kernel)
    reads = kernel.loaded / (kernel.loaded + kernel.stored)
    memory, latency, ends = moved / achieved, alive * max(0.0, waves - 1), launches * (LAUNCH + alive)
    issue = issue_seconds(gpu, kernel, programs, SCHEDULERS * gpu.units)
    return Estimate(
        at_peak=moved / gpu.bandwidth,
        memory=memory,
        issue=issue,
        latency=latency,
        ends=ends,
        total=max(memory, issue, latency) + ends,
        launches=launches,
        programs=programs,
        waves=waves,
        tail=1 - waves / math.ceil(waves) if waves else 0.0,
        warps=resident * kernel.num_warps,
        most_warps=SCHEDULERS * gpu.unit.warps,
        in_flight=resident * kernel.block * kernel.loaded,
        needed=achieved * reads * MEMORY_LATENCY / gpu.units,
    )


def one_after_the_other(first: Estimate, second: Estimate) -> Estimate:
    """Of two passes: times, launches and programs of both; what is resident is the second's."""
    added = ("at_peak", "memory", "issue", "latency", "ends", "total", "launches", "programs")
    return second._replace(**{name: getattr(first, name) + getattr(second, name) for name in added})
