"""Tables that the host writes and a device reads: no copy on its way is overwritten."""

from __future__ import annotations

import types
from array import array

import pytest
import torch

from triton_optim.backends.triton import staging
from triton_optim.backends.triton.staging import SLOTS, Staging


def test_on_the_cpu_a_table_is_written_where_it_lies() -> None:
    table = Staging(5, torch.int64, torch.device("cpu"))
    place = table.tensor.data_ptr()
    assert place % 16 == 0
    for k in range(3):
        table.push(array("q", [k, -1, 2**40, 0, 7]))
        assert table.tensor.tolist() == [k, -1, 2**40, 0, 7]
    assert table.tensor.data_ptr() == place


def test_a_pinned_table_waits_until_it_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that copies only when it is waited for: copies are made in order, and each of what was pushed."""
    pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    copied: list[list[int]] = []
    waited: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            self.number, Event.made = Event.made, Event.made + 1

        def synchronize(self) -> None:
            while any(number == self.number for number, *_ in pending):
                waited.append(self.number)
                _, source, target = pending.pop(0)
                target.data.set_(source.clone())
                copied.append(source.tolist())

        def record(self, stream: str) -> None:
            assert stream == "its stream"
            pending.append((self.number, *copies.pop()))

    copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    class OnDevice(torch.Tensor):
        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> OnDevice:
            assert non_blocking
            copies.append((source, self))
            return self

    module = types.SimpleNamespace(Event=Event, current_stream=lambda device: "its stream")
    monkeypatch.setattr(staging.torch, "get_device_module", lambda device: module)
    empty = torch.empty
    monkeypatch.setattr(staging.torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    table = Staging(2, torch.int64, torch.device("cpu"))
    table._address, table.tensor = 0, table.tensor.as_subclass(OnDevice)
    pushed = [[k, -k] if k % 3 else [k] for k in range(3 * SLOTS)]  # some of a part of the table
    for values in pushed:
        table.push(array("q", values))
    assert Event.made == SLOTS
    assert len(waited) == len(copied) == 2 * SLOTS
    for number in range(SLOTS):
        table._ring[number][1].synchronize()
    assert copied == pushed
