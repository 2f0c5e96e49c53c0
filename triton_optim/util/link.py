"""Copies between a device and host memory, in both directions beside what computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import GPUS

Pairs = Iterable[tuple[Tensor, Tensor]]  # where to, and where from; of one dtype and shape


def pins(device: torch.device) -> bool:
    """Whether copies to and from a device go on by themselves where host memory is page-locked."""
    return device.type in GPUS


def host_memory(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Host memory laid out as a tensor; page-locked where that is of use.

    Args:
        dtype: of what it is to hold; by default the tensor's.
    """
    return torch.empty_like(
        like, dtype=dtype, device="cpu", memory_format=torch.preserve_format, pin_memory=pins(like.device)
    )


class Link:
    """The way between a device and the host. On a GPU each direction has a stream of its own, beside the current one;
    elsewhere a copy is done when it is asked for.

    Args:
        device: what is linked to the host.
        api: where the streams and events are that torch has for it; by default what torch says, on a GPU.
    """

    def __init__(self, device: torch.device, api: Any = None) -> None:
        self._device = device
        self._api = torch.get_device_module(device) if api is None and pins(device) else api
        if self._api is not None:
            self._over, self._back = self._api.Stream(device=device), self._api.Stream(device=device)

    def begin(self) -> None:
        """Let copies wait for what the device was given to do so far, such as a backward pass."""
        if self._api is not None:
            current = self._api.current_stream(self._device)
            self._over.wait_stream(current)
            self._back.wait_stream(current)

    def over(self, pairs: Pairs) -> Callable[[], object]:
        """Copy to the host; returns what waits until that is done."""
        self._copy(pairs, None if self._api is None else self._over)
        if self._api is None:
            return int  # nothing to wait for
        event = self._api.Event()
        event.record(self._over)
        return event.synchronize  # type: ignore[no-any-return]

    def back(self, pairs: Pairs) -> None:
        """Copy what the host has written to the device; nothing waits for it before :meth:`end`."""
        self._copy(pairs, None if self._api is None else self._back)

    def end(self) -> None:
        """Let what the device is given to do from here on wait for all copies. The host does not."""
        if self._api is not None:
            current = self._api.current_stream(self._device)
            current.wait_stream(self._over)
            current.wait_stream(self._back)

    def _copy(self, pairs: Pairs, stream: Any) -> None:
        if stream is None:
            for to, source in pairs:
                to.copy_(source)
            return
        with self._api.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
