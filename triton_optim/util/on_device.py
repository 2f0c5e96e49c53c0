"""The hyperparameters of an optimizer in device memory, where captured steps read them."""

from __future__ import annotations

from array import array
from functools import cache
from itertools import accumulate
from typing import Any

import torch


@cache
def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"  # torch makes a new text of it each time


def capturing(device: torch.device) -> bool:
    """Whether the device's work is being recorded into a graph now."""
    return _is_cuda(device) and torch.cuda.is_current_stream_capturing()


class OnDevice:
    """All numbers of the parameter groups, their seeds and the largest norm, in one tensor on a device.

    What is a tensor already stays what it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._groups: list[dict[str, Any]] = []
        self.seen: list[Any] = []  # what tells that nothing changed where it is as before
        self.rebuilt = 0  # how often the numbers have come to lie elsewhere
        self._pushed: list[float] = []
        self._names: list[list[str]] = []  # of each group's
        self._first: list[int] = []  # of each group, the index of its first
        self._memory = torch.empty(0, dtype=torch.float64, device=device)
        self.max_norm = self._memory  # float64 (1,)

    def push(self, groups: list[dict[str, Any]], max_norm: float | None, captured: bool) -> None:
        """Bring the device up to date, without waiting for it; a copy only where something changed.

        Args:
            groups: the plain ones.
            max_norm: the largest norm allowed; None for any.
            captured: whether a captured step reads what is there.
        """
        own = list(map(numbers, groups))
        now = [x for group in own for _, x in group]
        now.append(float("inf") if max_norm is None else float(max_norm))
        self._groups = groups
        if now == self._pushed:
            return
        if capturing(self.device):
            raise RuntimeError(
                "hyperparameters changed since they were last brought to the device, which can't be done while a graph "
                "is captured. Call optimizer.push_hyperparameters() before."
            )
        names = [[name for name, _ in group] for group in own]
        if names != self._names:
            if captured:
                raise RuntimeError(
                    "the parameter groups have other hyperparameters than when a step was captured, which will read "
                    "the old ones. Capture it again, with a new optimizer or after a step of this one."
                )
            self._memory = torch.empty(len(now), dtype=torch.float64, device=self.device)
            self.max_norm = self._memory[-1:]
            self.rebuilt += 1
        staged = torch.frombuffer(array("d", now), dtype=torch.float64)
        if self.device.type != "cpu":
            staged = staged.pin_memory()  # of its own, so that none in flight is overwritten
        self._memory.copy_(staged, non_blocking=True)
        self._pushed = now
        self._names = names
        self._first = [0, *accumulate(map(len, own))]

    def group(self, index: int) -> dict[str, Any]:
        """The numbers of a group as 0-dim float64 tensors; ``seed`` as its two halves, int32."""
        group = self._groups[index]
        found: dict[str, Any] = {}
        for at, name in enumerate(self._names[index], self._first[index]):
            value = self._memory[at]
            if name == "seed":
                found.setdefault(name, []).append(value.to(torch.int32))
            elif isinstance(group[name], (tuple, list)):
                found[name] = (*found.get(name, ()), value)
            else:
                found[name] = value
        return found

    def names(self, index: int) -> dict[str, Any]:
        """Of a group's numbers, the names that :meth:`address` takes, and their dtype; of a tuple's a list."""
        group = self._groups[index]
        found: dict[str, Any] = {}
        for at, name in enumerate(self._names[index], self._first[index]):
            value = (("hyper", at), torch.float64)
            if name == "seed" or isinstance(group[name], (tuple, list)):
                found.setdefault(name, []).append(value)
            else:
                found[name] = value
        return found

    def address(self, at: int) -> int:
        """Where a number lies."""
        return self._memory.data_ptr() + at * self._memory.itemsize


def numbers(group: dict[str, Any]) -> list[tuple[str, float]]:
    """The hyperparameters of a plain group that are numbers, of tuples each; the seed as signed halves."""
    seed = int(group.get("seed", 0))
    found = [("seed", float(half(seed))), ("seed", float(half(seed >> 32)))]
    for name, value in group.items():
        if name == "seed":
            continue
        if isinstance(value, (tuple, list)):
            if all(type(x) in (int, float) for x in value):
                found += [(name, float(x)) for x in value]
        elif type(value) in (int, float):
            found.append((name, float(value)))
    return found


def half(x: int) -> int:
    """The lower 32 bits, as a signed number."""
    return (x + 2**31) % 2**32 - 2**31
