"""What is kept of a value: codes in blocks, and corrections of parameters."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.core.convert import master
from triton_optim.precision.codecs import Codec, codes, new_parts, read, with_residual, write

CODES = [codes("int8", False), codes("int8", True), codes("int4", False), codes("int4", True)]
LARGEST = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15}
BF16 = torch.bfloat16
HALVES = [torch.bfloat16, torch.float16]
CORRECTED = ["kahan", "split24", "split32", "master"]


# Codes.


def there_and_back(codec: Codec, x: Tensor) -> Tensor:
    return read(codec, new_parts(codec, x.flatten()), x.flatten()).view(x.shape)


def dynamic_map(signed: bool) -> Tensor:
    """The 8-bit dynamic code of Dettmers et al. 2022, section 2.1, as bitsandbytes builds it: of each power of ten, so
    many values evenly between a tenth of it and itself, twice as many as of the one below.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for power in range(7):
        count = 2 ** (power if signed else power + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        own = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)
        values += [own, -own] if signed else [own]
    return torch.cat(values).sort().values


def test_the_reference_has_256_values() -> None:
    assert len(dynamic_map(True)) == len(dynamic_map(False)) == 256


def nearest(values: Tensor, x: Tensor) -> Tensor:
    middles = (values[1:] + values[:-1]) / 2
    return values[torch.bucketize(x, middles)]


@cache
def data(kind: str) -> Tensor:
    """Blocks of 256 values."""
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(400, 256, generator=random, dtype=torch.float64)
    other = torch.randn(3, 400, 256, generator=random, dtype=torch.float64)
    if kind == "normal":
        return normal
    if kind == "student's t":
        return normal / (other.square().sum(0) / 3).sqrt()
    if kind == "log-normal scales":
        return normal * other[0].exp()
    if kind == "squares":
        return normal.square()
    if kind == "squares of student's t":
        return (normal / (other.square().sum(0) / 3).sqrt()).square()
    mean = torch.zeros_like(normal)
    for _ in range(500):
        mean = 0.99 * mean + 0.01 * torch.randn(mean.shape, generator=random, dtype=torch.float64).square()
    return mean * other[0].exp().square() if kind == "means of squares of many sizes" else mean


@pytest.mark.parametrize("norm", ["mean", "root mean square"])
@pytest.mark.parametrize(
    ("kind", "signed"),
    [
        ("normal", True),
        ("student's t", True),
        ("log-normal scales", True),
        ("squares", False),
        ("squares of student's t", False),
        ("means of squares", False),
        ("means of squares of many sizes", False),
    ],
)
def test_error_beside_the_dynamic_code(kind: str, signed: bool, norm: str) -> None:
    x = data(kind)
    largest = x.abs().amax(1, keepdim=True)
    theirs = nearest(dynamic_map(signed), x / largest) * largest
    ours = there_and_back(codes("int8", not signed), x.float()).double()

    def error(found: Tensor) -> float:
        relative = ((found - x) / largest).abs()
        by_block = relative.mean(1) if norm == "mean" else relative.square().mean(1).sqrt()
        return float(by_block.mean())

    assert error(ours) <= error(theirs)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_what_is_never_negative_is_0_only_where_it_was(state_dtype: str) -> None:
    """The root of a second moment is divided by: however small beside its block, it stays above 0."""
    codec = codes(state_dtype, True)
    x = torch.full((codec.block_size,), 1e-12)
    x[0], x[1::2] = 1.0, 0.0
    kept = read(codec, new_parts(codec, x), x)
    assert torch.equal(kept > 0, x > 0)


@pytest.mark.parametrize("codec", CODES, ids=lambda codec: codec.name)
def test_every_code_stays(codec: Codec) -> None:
    largest, block_size = LARGEST[codec.name], codec.block_size
    signed = not codec.name.startswith("u")
    every = torch.arange(-largest if signed else 0, largest + 1)
    k = torch.full((block_size,), largest)
    k[: len(every)] = every
    packed = k if codec.elements_per_item[0] == 1 else (k[::2] & 15) | ((k[1::2] & 15) << 4)
    parts = [packed.to(torch.int8), torch.full((1,), 0.37, dtype=codec.dtypes[1])]
    values = read(codec, parts, torch.zeros(block_size))
    assert (values[: len(every)].diff() > 0).all()
    for random in (None, torch.full((block_size,), -1, dtype=torch.int32), torch.zeros(block_size, dtype=torch.int32)):
        again = [torch.zeros_like(part) for part in parts]
        write(codec, again, values, random=random)
        found = read(codec, again, values)
        # A scale that is off by an ulp leaves a code a hair above or below itself, which the random bits may turn over.
        assert int((again[0] != parts[0]).sum()) <= (0 if random is None else 0.1 * block_size)
        torch.testing.assert_close(found[0], values[0])


@pytest.mark.parametrize("codec", CODES, ids=lambda codec: codec.name)
def test_zeros_stay_and_the_largest_does(codec: Codec) -> None:
    x = torch.zeros(2 * codec.block_size)
    assert torch.equal(there_and_back(codec, x), x)
    x[3] = 1e-20
    assert torch.equal(there_and_back(codec, x) != 0, x != 0)
    torch.testing.assert_close(there_and_back(codec, x)[3], x[3], rtol=2.0**-7 if codec.random else 1e-6, atol=0)


@pytest.mark.parametrize("codec", [c for c in CODES if c.name.startswith("u")], ids=lambda codec: codec.name)
def test_what_is_not_zero_is_not_kept_as_zero(codec: Codec) -> None:
    x = torch.logspace(0, -30, codec.block_size)
    kept = there_and_back(codec, x)
    assert (kept > 0).all()
    assert float(kept.min()) < 3e-4


def test_half_codes_are_right_on_average() -> None:
    x = torch.rand(64)
    x[0] = 1
    codec = codes("int4", False)
    blocks = x.repeat(4000)
    parts = new_parts(codec, blocks)
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, blocks.shape, generator=random, dtype=torch.int32)
    write(codec, parts, blocks, random=bits)
    found = read(codec, parts, blocks).view(4000, 64).mean(0)
    # Linear between two codes, so the mean is exact: 5 sigma of a coin between steps of at most 0.24.
    assert float((found - x).abs().max()) < 5 * 0.5 * 0.24 / math.sqrt(4000)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_a_bad_gradient_stays_in_its_block(state_dtype: str, backend: str, device: torch.device) -> None:
    if backend == "compiled" and state_dtype == "int4":
        pytest.skip("takes 15 seconds to compile, and blocks of int8 are handled alike")
    block_size = codes(state_dtype, False).block_size
    bad = {2: math.nan, 5: math.inf, 9: -math.inf}  # by block
    ends = []
    for spoilt in (False, True):
        p = Parameter(torch.linspace(-1, 1, 16 * 256, device=device))
        optimizer = triton_optim.AdamW([p], state_dtype=state_dtype, backend=backend)
        for k in range(3):
            p.grad = torch.linspace(1, 2, 16 * 256, device=device)
            if spoilt and k == 1:
                for block, value in bad.items():
                    p.grad[block * block_size + 7] = value
            optimizer.step()
        ends.append(p.detach().clone())
    inside = torch.zeros_like(ends[0], dtype=torch.bool)
    for block in bad:
        inside[block * block_size : (block + 1) * block_size] = True
    assert ends[1][inside].isnan().all()
    assert torch.equal(ends[0][~inside], ends[1][~inside])


# Corrections.


def bits(count: int) -> Tensor:
    """Numbers of all exponents, NaN among them."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31 - 1, (count,), generator=random, dtype=torch.int32).view(torch.float32)


def kept_as(codec: Codec, x: Tensor) -> list[Tensor]:
    return new_parts(codec, x, first=torch.empty_like(x, dtype=codec.dtypes[0]))


def test_split32_of_bfloat16_is_exact() -> None:
    x = torch.cat((bits(1_000_000), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.00390625, -1.01171875])))
    codec = with_residual("split32", BF16)
    parts = kept_as(codec, x)
    found = read(codec, parts, x)
    numbers = ~x.isnan()
    assert torch.equal(found.view(torch.int32)[numbers], x.view(torch.int32)[numbers])
    assert found[~numbers].isnan().all()
    # The parameter itself is the nearest; of a tie, the one away from 0.
    both = numbers & (x.abs() < 3e38)
    rounded = x.to(BF16)
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(parts[0][both & ~tie], rounded[both & ~tie])


@pytest.mark.parametrize("precision", ["split24", "split32", "kahan"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_how_much_a_correction_keeps(precision: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=random) * torch.logspace(-3, 4, 100_000)
    x = x[x.abs() > 1e-4]
    codec = with_residual(precision, dtype)
    parts = kept_as(codec, x)
    found = read(codec, parts, x)
    own_bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    more = {"split24": 8, "split32": 24 - own_bits, "kahan": own_bits}[precision]
    # An ulp of the value with stochastic rounding, else half of one; a compensation in float16 has no more
    # than multiples of 2^-24.
    smallest = 2.0**-25 if (precision, dtype) == ("kahan", torch.float16) else 0.0
    assert ((found - x).abs() <= 2.0 ** -(own_bits + more - 1) * x.abs() + smallest).all()
    nearest_error = ((parts[0].float() - x) / x).abs().max()
    assert float(nearest_error) <= 2.0**-own_bits * 1.001
    if precision == "split32":
        assert torch.equal(found, x)


@pytest.mark.parametrize("precision", CORRECTED)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_of_the_dtype_stays(precision: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    codec = with_residual(precision, dtype)
    parts = kept_as(codec, every.float())
    found = read(codec, parts, every)
    for values in (parts[0].float(), found):
        assert torch.equal(values[~every.isnan()], every.float()[~every.isnan()])
        assert values[every.isnan()].isnan().all()


def steps(count: int, backend: str, device: torch.device) -> int:
    """A twentieth of them in Triton's interpreter, which takes milliseconds a step."""
    return count // 20 if backend == "triton" and device.type == "cpu" else count


@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGD"])
def test_split32_is_training_in_float32(name: str, backend: str, device: torch.device) -> None:
    """400 steps, bit for bit, with the weights rounded for the forward pass."""
    if name != "AdamW" and backend in ("compiled", "triton"):
        pytest.skip("takes seconds, and the codec is the same for every rule")
    count = steps(400, backend, device)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=random).to(device, BF16)
    y = torch.randn(64, 8, generator=random).to(device, BF16)
    start = [(torch.randn(shape, generator=random) / 4).to(BF16).to(device) for shape in ((16, 64), (64, 8))]
    settings: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "backend": backend}
    if name == "SGD":
        settings["momentum"] = 0.9
    cls = getattr(triton_optim, name)
    ours = [Parameter(p.clone()) for p in start]
    wide = [Parameter(p.float()) for p in start]
    split = cls(ours, param_precision="split32", state_dtype=torch.float32, **settings)
    exact = cls(wide, **settings)

    def gradients(weights: list[Tensor]) -> list[Tensor]:
        leaves = [w.detach().requires_grad_() for w in weights]
        loss = (torch.relu(x @ leaves[0]) @ leaves[1] - y).square().mean()
        return list(torch.autograd.grad(loss, leaves))

    codec = with_residual("split32", BF16)
    for step in range(count):
        for p, g in zip(ours, gradients(list(ours)), strict=True):
            p.grad = g
        rounded = [kept_as(codec, w.detach())[0] for w in wide]
        for w, g in zip(wide, gradients(rounded), strict=True):
            w.grad = g.float()
        split.step()
        exact.step()
        if (step + 1) % (count // 10) == 0:
            for p, w in zip(ours, wide, strict=True):
                assert torch.equal(master(p, split), w)
                assert torch.equal(p, kept_as(codec, w.detach())[0])
    assert not torch.equal(ours[0], start[0])


@pytest.mark.parametrize("precision", ["storage", "kahan", "split24", "split32", "master"])
def test_1000_updates_of_a_thousandth(precision: str, backend: str, device: torch.device) -> None:
    if backend == "compiled" and precision != "split24":
        pytest.skip("takes seconds to compile: test_codecs.py has the others on every backend")
    p = Parameter(torch.ones(512, dtype=BF16, device=device))
    optimizer = triton_optim.SGD([p], lr=2.0**-10, maximize=True, param_precision=precision, backend=backend)
    p.grad = torch.ones_like(p)
    count = steps(1000, backend, device)
    for _ in range(count):
        optimizer.step()
    exact = 1 + count * 2.0**-10
    value = master(p, optimizer)
    if precision == "storage":
        assert (p == 1).all()
    elif precision == "kahan":
        assert float((p.detach().float() - exact).abs().max()) <= 2.0**-7
    else:
        assert float((value / exact - 1).abs().max()) <= 2.0**-14


def test_split24_is_right_on_average(backend: str, device: torch.device) -> None:
    """Updates that no number of its bits would add up to exactly."""
    random = torch.Generator().manual_seed(0)
    start = (1 + torch.rand(8192, generator=random)).to(BF16).to(device)
    p = Parameter(start.clone())
    optimizer = triton_optim.SGD([p], lr=1.0, maximize=True, param_precision="split24", backend=backend)
    p.grad = start * 2.0**-10
    count = steps(200, backend, device)
    for _ in range(count):
        optimizer.step()
    error = master(p, optimizer).double() / (start.double() * (1 + count * 2.0**-10)) - 1
    assert abs(float(error.mean())) < 2.0**-17
    assert float(error.abs().max()) < 2.0**-10
