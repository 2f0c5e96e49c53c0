"""The C++ backend: what a rule becomes, and the bits of a step."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conftest import CPP
from many_forms import Scalars, many_forms
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim import RuleOptimizer
from triton_optim.backends.cpp import chunks as cpp_chunks
from triton_optim.backends.cpp import norm as cpp_norm
from triton_optim.buckets.gradient_norm import Norm, eager_partial_norms, norm_from
from triton_optim.kernels.language import jit
from triton_optim.spec import State
from triton_optim.util import cpp_build

pytestmark = CPP
BF16 = torch.bfloat16


class Momentum(RuleOptimizer):
    """An optimizer from whatever rule a test brings."""

    states = (State("momentum"),)

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "beta": beta}, **options)

    def scalars(self, group: dict[str, Any], step: Any) -> Scalars:
        return Scalars(group["lr"], group["beta"])


def optimizer_of(a_rule: Any) -> type[RuleOptimizer]:
    return type("Momentum", (Momentum,), {"rule": a_rule})


def test_all_forms_of_the_language_are_followed() -> None:
    random = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(1000, generator=random), torch.randn(1000, generator=random) * 2
    found = []
    for backend in ("eager", "cpp"):
        p = Parameter(start.clone())
        optimizer = optimizer_of(many_forms)([p], backend=backend)
        for _ in range(3):
            p.grad = gradient.clone()
            optimizer.step()
        found.append((p.detach(), optimizer.state[p]["momentum"]))
    for ours, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


# The bits of a step.

LENGTHS = [0, 1, 15, 16, 17, 255, 257, 4097, cpp_chunks.CHUNK - 1, cpp_chunks.CHUNK + 1, 3 * cpp_chunks.CHUNK + 7]


# With these there is so much that what is further on is asked of memory while strips of a chunk are at work.
MANY = [*LENGTHS, 28 * cpp_chunks.CHUNK + 77]


def trained(
    backend: str,
    dtype: torch.dtype,
    offset: int = 0,
    threads: int = 1,
    lengths: Sequence[int] = LENGTHS,
    **options: Any,
) -> list[Tensor]:
    """Parameters and states of Lion, which takes no root: torch's own is not the nearest number to it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        random = torch.Generator().manual_seed(0)
        params = [Parameter(torch.randn(n + offset, generator=random).to(dtype)[offset:]) for n in lengths]
        optimizer = triton_optim.Lion(params, lr=0.01, weight_decay=0.1, backend=backend, **options)
        for k in range(3):
            for i, p in enumerate(params):
                p.grad = None if (i + k) % 4 == 3 else torch.randn(len(p), generator=random).to(dtype)
            optimizer.step()
        return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]
    finally:
        torch.set_num_threads(before)


KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {"ema_decay": 0.9}),
    "float16": (torch.float16, {}),
    "bfloat16": (BF16, {"ema_decay": 0.9, "ema_dtype": BF16}),
    "stochastic": (BF16, {"param_precision": "stochastic", "state_dtype": BF16}),
    "half stochastic": (torch.float16, {"param_precision": "stochastic", "state_dtype": "int4"}),
    "kahan": (BF16, {"param_precision": "kahan", "state_dtype": "int8"}),
    "split24": (BF16, {"param_precision": "split24", "state_dtype": "int4", "ema_decay": 0.9}),
    "split32": (torch.float16, {"param_precision": "split32", "state_dtype": torch.float32}),
    "master": (BF16, {"param_precision": "master", "state_dtype": "int8", "ema_decay": 0.9}),
}


@pytest.mark.parametrize("name", KEPT)
def test_every_bit_is_the_eager_backends(name: str) -> None:
    """Nothing is contracted, reassociated or approximated, and the random bits are the same."""
    dtype, options = KEPT[name]
    for lengths in (LENGTHS, MANY):
        found, expected = (trained(backend, dtype, lengths=lengths, **options) for backend in ("cpp", "eager"))
        for ours, eager in zip(found, expected, strict=True):
            assert ours.dtype == eager.dtype
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "stochastic", "split24"])
def test_threads_and_alignment_change_no_bit(name: str) -> None:
    dtype, options = KEPT[name]
    expected = trained("cpp", dtype, **options)
    for offset, threads in ((1, 1), (0, 2), (3, 5)):
        found = trained("cpp", dtype, offset, threads, **options)
        shifted = trained("eager", dtype, offset, **options) if offset else expected
        assert all(map(torch.equal, found, shifted))


def every_bit(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.fixture
def by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """From where it is called on, libraries are for any processor of this kind, even one without AVX2 and F16C."""
    from triton_optim.backends.cpp import bucket as cpp_backend

    def forget() -> None:
        cpp_backend.step_of.cache_clear()
        cpp_norm.sums_of.cache_clear()

    def start() -> None:
        forget()
        flags = tuple(flag for flag in cpp_build.FLAGS if not flag.startswith("-m"))
        for module in (cpp_backend, cpp_norm):
            monkeypatch.setattr(module, "library", partial(cpp_build.library, flags=flags))

    yield start
    monkeypatch.undo()
    forget()


# Whole rows, converted by the processor and without it, and less than one.
as_many = pytest.mark.parametrize(
    ("length", "processor"), [(2**20, True), (2**20, False), (31, True)], ids=["rows", "by arithmetic", "less"]
)


@as_many
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_and_made(
    dtype: torch.dtype, length: int, processor: bool, by_arithmetic: Callable[[], None]
) -> None:
    """Subnormal ones, infinities and NaN too: a step without a learning rate."""
    if not processor:
        by_arithmetic()
    values = every_bit(dtype)
    params = [Parameter(own.clone()) for own in values.split(length)]
    for p in params:
        p.grad = torch.zeros_like(p)
    triton_optim.Lion(params, lr=0.0, weight_decay=0.0, backend="cpp").step()
    found = torch.cat([p.detach() for p in params])
    assert torch.equal(found.isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(found[known].view(torch.int16), values[known].view(torch.int16))


@as_many
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_rounding_is_to_the_nearest_even(
    dtype: torch.dtype, length: int, processor: bool, by_arithmetic: Callable[[], None]
) -> None:
    """What lies between two neighbours, and half-way: the state takes the gradient as it is."""
    if not processor:
        by_arithmetic()
    wide = every_bit(dtype).float()
    wide = wide[wide.isfinite()]
    eps = torch.finfo(dtype).eps
    g = torch.cat([wide * factor for factor in (1, 1 + eps / 2, 1 + eps / 4, 1 + 3 * eps / 4, 1 - eps / 2)])
    g = torch.cat([g, torch.tensor([1e-45, -1e-40, 3e-8, 65519.9, 65520.0, -1e38, math.inf, -math.inf])])
    params = [Parameter(torch.zeros(len(own))) for own in g.split(length)]
    optimizer = triton_optim.SGD(params, lr=0.0, momentum=1.0, backend="cpp")
    for p, own in zip(params, g.split(length), strict=True):
        p.grad = own.clone()
        optimizer.state[p]["momentum_buffer"] = torch.zeros(len(own), dtype=dtype)
    optimizer.step()
    found = torch.cat([optimizer.state[p]["momentum_buffer"] for p in params])
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.int16), (g + 0.0).to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_sums_round_to_the_nearest_even(dtype: torch.dtype) -> None:
    """As above where nothing else is kept: sums of two numbers of 16 bits, beyond the largest too."""
    values = every_bit(dtype)
    values = values[values.isfinite()]
    eps = torch.finfo(dtype).eps
    for share in (eps / 2, eps / 4, 3 * eps / 4, -eps / 2):
        p = Parameter(torch.zeros_like(values))
        p.grad = (values.float() * share).to(dtype)
        optimizer = triton_optim.SGD([p], lr=0.0, momentum=1.0, backend="cpp")
        optimizer.state[p]["momentum_buffer"] = values.clone()
        optimizer.step()
        expected = (values.float() + p.grad.float()).to(dtype)
        assert torch.equal(optimizer.state[p]["momentum_buffer"].view(torch.int16), expected.view(torch.int16))


def test_every_nan_of_bfloat16_stays_nan() -> None:
    """Of a gradient, in whatever is made of it: a rounding that adds to its bits could carry into the sign."""
    values = every_bit(BF16)
    p = Parameter(torch.ones_like(values))
    p.grad = values
    optimizer = triton_optim.AdamW([p], backend="cpp")
    optimizer.step()
    for found in (p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]):
        assert found[values.isnan()].isnan().all()
        assert not found[values.abs() < 1e18].isnan().any()


NAN_OF_ONES = struct.unpack("<d", b"\xff" * 7 + b"\x7f")[0]


@jit
def rule_of_scalars(p: Tensor, g: Tensor, momentum: Tensor, h: Scalars) -> tuple[Tensor, Tensor]:
    return p - h.lr * g, momentum + h.beta * g


def test_a_number_that_is_nan_with_more_bits_than_bfloat16_has_makes_nan() -> None:
    p = Parameter(torch.ones(100, dtype=BF16))
    p.grad = torch.ones_like(p)
    optimizer = optimizer_of(rule_of_scalars)([p], beta=NAN_OF_ONES, backend="cpp")
    optimizer.step()
    assert optimizer.state[p]["momentum"].isnan().all()
    assert p.detach().isfinite().all()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "stochastic", "split32"])
def test_what_the_processor_has_changes_no_bit(name: str, by_arithmetic: Callable[[], None]) -> None:
    dtype, options = KEPT[name]
    expected = trained("cpp", dtype, **options)
    by_arithmetic()
    assert all(map(torch.equal, trained("cpp", dtype, **options), expected))


def test_subnormal_numbers_are_not_flushed() -> None:
    p = Parameter(torch.full((64,), 1e-42))
    p.grad = torch.full((64,), 1e-43)
    triton_optim.SGD([p], lr=1.0, backend="cpp").step()
    assert torch.equal(p.detach(), torch.full((64,), 1e-42) - torch.full((64,), 1e-43))


def test_an_index_goes_past_2_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of a sharded parameter: its elements are numbered on, and the upper half of the index counts."""
    from triton_optim.buckets import bucket

    first = 2**32 - 1005  # no whole rows before it
    monkeypatch.setattr(bucket, "first_index", lambda p: first)
    found = [trained(backend, BF16, param_precision="stochastic", state_dtype=BF16) for backend in ("cpp", "eager")]
    monkeypatch.setattr(bucket, "first_index", lambda p: 0)
    other = trained("cpp", BF16, param_precision="stochastic", state_dtype=BF16)
    assert not all(map(torch.equal, found[0], other))
    assert all(map(torch.equal, *found))


# The norm.


@pytest.mark.parametrize("power", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16, torch.float16], ids=str)
def test_the_norm_has_the_same_bits_for_any_number_of_threads(power: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=random).to(dtype) for n in LENGTHS]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(cpp_norm.partial_norms(tensors, Norm(power)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)
    exact = norm_from(eager_partial_norms(tensors, Norm(power)), Norm(power))
    torch.testing.assert_close(norm_from(found[0], Norm(power)), exact, rtol=1e-13, atol=0)
    for bad in (math.nan, -math.inf):
        tensors[-1][-1] = bad
        spoilt = cpp_norm.partial_norms(tensors, Norm(power))
        assert spoilt[:, 1].sum() == 1
        assert torch.equal(norm_from(spoilt, Norm(power)).isnan(), torch.tensor(math.isnan(bad)))


# How work is shared out.


def test_chunks_hold_every_element_once() -> None:
    chunks = cpp_chunks.Chunks(LENGTHS)
    covered = [torch.zeros(n, dtype=torch.int64) for n in LENGTHS]
    for tensor, start, stop in chunks.chunks.tolist():
        assert 0 < stop - start <= cpp_chunks.CHUNK
        assert start % 256 == 0
        covered[tensor][start:stop] += 1
    assert all((c == 1).all() for c in covered)
    bounds = chunks.first.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(chunks)
    sizes = (chunks.chunks[:, 2] - chunks.chunks[:, 1]).tolist()
    portions = [sum(sizes[a:b]) for a, b in itertools.pairwise(bounds)]
    assert all(0 < portion < 2 * cpp_chunks.CHUNK for portion in portions)


def test_no_thread_is_woken_for_tiny_work() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cpp_chunks.Chunks([100] * 10).threads() == 1
        assert cpp_chunks.Chunks([100_000]).threads() == 3
    finally:
        torch.set_num_threads(before)
