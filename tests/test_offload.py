"""Steps on the host of parameters that lie elsewhere: the same as those of the C++ backend, with copies beside them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import CPP
from offloading import BF16, F32, each, everything, give, made, resumed, train, trained
from sharding import playing
from side_by_side import assert_equal
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

import triton_optim as to
from triton_optim.backends.cpp import chunks
from triton_optim.backends.cpp.bucket import CppBucket
from triton_optim.dispatch import LaunchError
from triton_optim.engine import offload
from triton_optim.util.layout import with_local
from triton_optim.util.link import Link

pytestmark = CPP


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is several, as one of millions of elements is."""
    monkeypatch.setattr(chunks, "STRETCH", chunks.CHUNK)


class Late:
    """A way between two devices on which everything arrives as late as it may, and what is too early is NaN."""

    def __init__(self, device: torch.device) -> None:
        self.coming: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        assert not self.coming

    def over(self, pairs: Any) -> Callable[[], object]:
        own = list(pairs)
        for to_host, _ in own:
            to_host.fill_(torch.nan)

        def arrive() -> None:
            while own:
                to_host, source = own.pop()
                to_host.copy_(source)

        return arrive

    def back(self, pairs: Any) -> None:
        self.coming += pairs

    def end(self) -> None:
        while self.coming:
            to_device, source = self.coming.pop()
            to_device.copy_(source)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "link_to", Late)


@each
@pytest.mark.usefixtures("late")
def test_steps_are_those_of_the_cpp_backend(cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = {"backend": "cpp"} | options
    here, there = (trained(cls, made(dtype), offload=where, **options) for where in (None, "cpu"))
    assert_equal(everything(there), everything(here))
    reports = [list(to.explain(opt)) for opt in (here, there)]
    assert [r.backend for r in reports[1]] == [r.backend for r in reports[0]]
    assert all(r.reason.startswith('offload="cpu" of parameters on cpu: ') for r in reports[1])


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("fault", [0.0, float("inf")])
def test_a_scalers_step_is_unscaled_and_skipped(fault: float) -> None:
    found = []
    for where in (None, "cpu"):
        params = made()
        opt = to.AdamW(params, amp="fused", max_grad_norm=1.0, ema_decay=0.5, offload=where)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for k in range(3):
            scaler.scale(torch.zeros(1))  # makes its tensors
            give(params, k)
            for p in params:
                p.grad.mul_(256.0)
            if k == 1:
                params[2].grad[3] += fault
            scaler.step(opt)
            scaler.update()
        assert opt.skipped == 0
        found.append([*everything(opt), opt.grad_norm, torch.tensor(scaler.get_scale())])
    assert_equal(*found)


# Checkpoints and copies


@pytest.mark.parametrize("saved_where", [None, "cpu"])
def test_training_resumes_with_and_without(saved_where: str | None) -> None:
    assert_equal(*resumed(torch.device("cpu"), saved_where))


@pytest.mark.usefixtures("late")
def test_what_users_do_to_parameters_is_seen() -> None:
    def disturbed(where: str | None) -> Any:
        params = made()
        opt = to.AdamW(params, lr=0.1, offload=where, ema_decay=0.5)
        train(opt, range(2))
        params[0].data.mul_(2)  # which counts no version
        params[1].data = params[1].data.clone()
        with torch.no_grad():
            params[2].add_(1)
        train(opt, range(2, 4))
        params[0].grad = params[0].grad.t().contiguous().t()
        opt.step()
        opt = copy.deepcopy(opt)
        return train(opt, range(4, 6))

    assert_equal(everything(disturbed("cpu")), everything(disturbed(None)))


@pytest.mark.usefixtures("late")
def test_parameters_of_several_dtypes_and_groups() -> None:
    def mixed(*where: str | None) -> Any:
        params = [*made(F32), *made(BF16), *made(torch.float64)]
        options = {"param_precision": "master", "max_grad_norm": 1.0, "ema_decay": 0.5}
        groups = [{"params": params[i::2], "offload": o} for i, o in enumerate(where)]
        return train(to.AdamW(groups, lr=0.1, **options), range(4))

    here = mixed(None, None)
    assert_equal(everything(mixed("cpu", "cpu")), everything(here))
    # Two norms are then summed, the last bit of which may differ.
    torch.testing.assert_close(everything(mixed("cpu", None)), everything(here))


@pytest.mark.usefixtures("late")
def test_parameters_with_gaps_of_one_element_and_of_none() -> None:
    def shaped(where: str | None) -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        values = [torch.randn(6, 8, generator=random)[:, 1:6], torch.ones(()), torch.ones(0, 3)]
        return everything(trained(to.AdamW, list(map(Parameter, values)), lr=0.1, offload=where, max_grad_norm=1.0))

    assert_equal(shaped("cpu"), shaped(None))


@pytest.mark.usefixtures("late")
def test_a_step_is_made_again_where_a_kernel_beside_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    run, failures = offload.Offload.run, [LaunchError("no launch")]

    def failing(self: Any, *args: Any) -> None:
        if failures:
            raise failures.pop()
        run(self, *args)

    monkeypatch.setattr(offload.Offload, "run", failing)
    params = made()
    opt = trained(to.AdamW, params, steps=1, offload="cpu")
    assert_equal(everything(opt), everything(trained(to.AdamW, made(), steps=1)))
    held = weakref.ref(params[0].grad)
    opt.zero_grad()
    assert held() is None


@pytest.mark.usefixtures("late")
def test_gradients_that_are_released_in_backward() -> None:
    def released(where: str | None) -> list[Tensor]:
        params = made()
        opt = to.AdamW(params, lr=0.1, offload=where)
        to.enable_gradient_release(opt)
        for _ in range(3):
            sum(p.square().sum() for p in params).backward()
            opt.step()
        return everything(opt)

    assert_equal(released("cpu"), released(None))


# Reports


def test_reports_say_what_is_where() -> None:
    numel = sum(p.numel() for p in made())
    opt = to.AdamW(made(BF16), offload="cpu", param_precision="master", state_dtype=F32)
    report = to.memory_report(opt)
    assert (report.weights, report.gradients, report.staging) == (2 * numel, 2 * numel, 4 * numel)
    assert (report.host, report.device) == ((4 + 4 + 4 + 4) * numel, 4 * numel)
    assert report.total == report.host + report.device
    assert "in host memory" in repr(report)
    assert "on the device" not in repr(to.memory_report(to.AdamW(made())))
    assert "offload" not in to.to_torch_state_dict(opt)["param_groups"][0]


# The order of copies and steps


class Timeline(Late):
    """A way to a device of set bandwidth, by a clock of its own: what a step takes is added where it is done."""

    rates = (1.0, 1.0, 1.0)  # seconds an element: over, stepped, back

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.now = self.over_until = self.back_until = 0.0
        self.lanes = [0.0, 0.0, 0.0]
        made_ways.append(self)

    def over(self, pairs: Any) -> Callable[[], object]:
        pairs = list(pairs)
        took = self.rates[0] * sum(source.numel() for _, source in pairs)
        self.over_until = max(self.over_until, self.now) + took
        self.lanes[0] += took
        done, arrive = self.over_until, super().over(pairs)

        def wait() -> None:
            self.now = max(self.now, done)
            arrive()

        return wait

    def back(self, pairs: Any) -> None:
        pairs = list(pairs)
        elements = sum(source.numel() for _, source in pairs)
        self.now += self.rates[1] * elements
        self.back_until = max(self.back_until, self.now) + self.rates[2] * elements
        self.lanes[1] += self.rates[1] * elements
        self.lanes[2] += self.rates[2] * elements
        super().back(pairs)

    @property
    def total(self) -> float:
        return max(self.now, self.over_until, self.back_until)


made_ways: list[Timeline] = []


@pytest.mark.parametrize("rates", [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (1, 3, 3), (0.5, 1, 0.5)])
def test_copies_and_arithmetic_overlap(rates: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes at most 1.1 times as long as the longest of its three parts, an embedding among the parameters."""
    shapes = [(1600, 256), (7,), *[(128, 256), (128,)] * 8, (1600, 256)]
    params = [Parameter(torch.zeros(shape, dtype=BF16)) for shape in shapes]
    opt = to.AdamW(params, offload="cpu", param_precision="master", state_dtype=F32)
    monkeypatch.setattr(offload, "link_to", Timeline)
    monkeypatch.setattr(Timeline, "rates", rates)
    made_ways.clear()
    give(params, 0)
    opt.step()
    (way,) = made_ways
    elements = sum(p.numel() for p in params)
    assert way.lanes == pytest.approx([rate * elements for rate in rates])  # only gradients come over
    assert way.total <= 1.1 * max(way.lanes)


class Recorder:
    """What torch has for the streams of a device, as it is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.streams: list[Any] = []
        self.current = self.Stream(device=None)
        self.now = self.current
        self.events = 0

    def Stream(self, device: Any) -> Any:
        recorder, number = self, len(self.streams)

        class Stream:
            name = ("current", "over", "back")[number]

            def wait_stream(self, other: Any) -> None:
                recorder.calls.append((self.name, "waits for", other.name))

        self.streams.append(Stream())
        return self.streams[-1]

    def Event(self) -> Any:
        recorder, number = self, self.events
        self.events += 1

        class Event:
            def record(self, stream: Any) -> None:
                recorder.calls.append((stream.name, "event", number))

            def synchronize(self) -> None:
                recorder.calls.append(("host", "waits for", number))

        return Event()

    def current_stream(self, device: Any) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.calls.append((stream.name, "copies"))
        yield


def test_streams_and_the_host_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(offload, "link_to", lambda device: Link(device, recorder))
    params = [Parameter(torch.zeros(3, chunks.CHUNK))]
    opt = to.AdamW(params, offload="cpu")
    give(params, 0)
    opt.step()
    assert opt.engine.plan is not None
    (bucket,) = opt.engine.plan.buckets
    assert isinstance(bucket, CppBucket)
    call = bucket.call

    def noted(given: int) -> None:
        recorder.calls.append(("host", "steps"))
        call(given)

    monkeypatch.setattr(bucket, "call", noted)
    recorder.calls.clear()
    opt.step()
    numbers = range(3, 6)  # of the second step
    assert recorder.calls == [
        ("over", "waits for", "current"),
        ("back", "waits for", "current"),
        *(call for k in numbers for call in (("over", "copies"), ("over", "event", k))),
        *(call for k in numbers for call in (("host", "waits for", k), ("host", "steps"), ("back", "copies"))),
        *[("host", "waits for", k) for k in numbers],
        ("current", "waits for", "over"),
        ("current", "waits for", "back"),
    ]
    assert params[0].grad is not None
    recorder.calls.clear()
    monkeypatch.setattr(CppBucket, "run_stretches", None)  # a step that fails
    with pytest.raises(TypeError):
        opt.step()
    assert recorder.calls[-2:] == [("current", "waits for", "over"), ("current", "waits for", "back")]


def test_host_memory_may_stand_for_what_is_sharded_over_gpus() -> None:
    """torch itself would move it there."""
    with playing(1, torch.device("cuda")) as mesh:
        p = DTensor.from_local(torch.zeros(2, 3, device="meta"), mesh, [Shard(0)], run_check=False)
        host = torch.ones(2, 3, dtype=BF16)
        own = with_local(p, host)
        assert isinstance(own, DTensor)
        assert own._local_tensor is host
        assert (own.device.type, own.dtype, own.shape, own.placements) == ("cpu", BF16, p.shape, p.placements)
