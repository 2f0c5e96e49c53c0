"""Properties of every rule, codec and shape: how near what is kept is, that what is kept stays, and that a step is a
step in float32 of which the results are then kept.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from table import CASES, Case
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.core.convert import master
from triton_optim.precision import codecs
from triton_optim.precision.codecs import (
    Codec,
    new_parts,
    part_names,
    read,
    restore_scales,
    stochastic,
    with_residual,
    write,
)
from triton_optim.precision.random_bits import bits_of_elements, row_key, tensor_keys

BF16, F16 = torch.bfloat16, torch.float16
CODES = [codecs.codes(dtype, nonnegative) for dtype in ("int8", "int4") for nonnegative in (False, True)]
KEPT = [
    stochastic(BF16),
    stochastic(F16),
    *(
        with_residual(precision, dtype)
        for precision in ("kahan", "split24", "split32", "master")
        for dtype in (BF16, F16)
    ),
]
LARGEST = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15}
# The bits of a number's size that each keeps, one less where it rounds either way; and float16's smallest step.
BITS = {
    "stochastic bfloat16": 7,
    "stochastic float16": 10,
    "kahan bfloat16": 15,
    "kahan float16": 21,
    "split24 bfloat16": 15,
    "split24 float16": 18,
    "split32 bfloat16": 24,
    "split32 float16": 24,
    "master": 24,
}
SMALLEST = {
    "stochastic float16": 2.0**-24,
    "kahan float16": 2.0**-25,
    "split24 float16": 2.0**-32,
    "split32 float16": 2.0**-40,
}
RULES = [
    (case, variant)
    for case in CASES
    if case.elementwise and not case.sparse
    for variant in case.variants
    if not case.variants[variant].get("centered")  # which needs exact states
]

quickly = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


def values(numel: int, exponent: int, wide: bool, seed: int) -> Tensor:
    """Normally distributed about a power of 10, or of many sizes; one in eight is 0."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=random, dtype=torch.float64) * 10.0**exponent
    if wide:
        x *= torch.randn(numel, generator=random, dtype=torch.float64).mul(2).exp()
    x[torch.rand(numel, generator=random) < 1 / 8] = 0
    return x.float()


def bits(numel: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, (numel,), generator=random, dtype=torch.int32)


@pytest.mark.parametrize("codec", CODES, ids=lambda codec: codec.name)
@quickly
@given(exponent=st.integers(-20, 20), wide=st.booleans(), seed=seeds)
def test_codes_of_values_that_were_read_of_codes_are_the_same(
    codec: Codec, exponent: int, wide: bool, seed: int
) -> None:
    """With their scales, so that what is saved as values is resumed bit for bit."""
    x = values(4096 + codec.block_size // 2, exponent, wide, seed)
    x = x.abs() if codec.name.startswith("u") else x
    parts = new_parts(codec, x)
    write(codec, parts, x, random=bits(x.numel(), seed))
    value = read(codec, parts, x)
    again = new_parts(codec, value)
    restore_scales(codec, again, value)
    assert torch.equal(read(codec, again, x), value)
    assert torch.equal(again[0], parts[0])


def kept(codec: Codec, x: Tensor, random: Tensor | None) -> list[Tensor]:
    parts = new_parts(codec, x, first=None if codec.block_size else torch.empty_like(x, dtype=codec.dtypes[0]))
    write(codec, parts, x, random=random)
    return parts


numbers = st.builds(values, st.integers(1, 700), st.integers(-4, 3), st.booleans(), seeds)
randoms = st.none() | seeds


@quickly
@given(x=numbers, codec=st.sampled_from(KEPT), seed=randoms)
def test_what_is_kept_is_near(x: Tensor, codec: Codec, seed: int | None) -> None:
    x = x.clamp(-60000, 60000)
    found = read(codec, kept(codec, x, None if seed is None else bits(len(x), seed)), x)
    assert ((found - x).abs() <= 2.0 ** -BITS[codec.name] * x.abs() + SMALLEST.get(codec.name, 0.0)).all()


def table_of(codec: Codec) -> Tensor:
    """What each code stands for, in units of a block, in float64."""
    largest = LARGEST[codec.name]
    every = torch.arange(0 if codec.name.startswith("u") else -largest, largest + 1)
    k = torch.zeros(codec.block_size, dtype=torch.int64)
    k[: len(every)] = every
    packed = k if codec.elements_per_item[0] == 1 else (k[::2] & 15) | ((k[1::2] & 15) << 4)
    parts = [packed.to(torch.int8), torch.ones(1, dtype=codec.dtypes[1])]
    return read(codec, parts, torch.zeros(codec.block_size))[: len(every)].double()


@quickly
@given(
    numel=st.integers(1, 700),
    exponent=st.integers(-10, 25),
    wide=st.booleans(),
    codec=st.sampled_from(CODES),
    seeds=st.tuples(seeds, randoms),
)
def test_a_code_is_a_neighbour_of_its_value(
    numel: int, exponent: int, wide: bool, codec: Codec, seeds: tuple[int, int | None]
) -> None:
    """The nearer one, unless random bits say which; and no value lies beyond the last code, or is kept as 0 where its
    root is divided by.
    """
    x = values(numel, exponent, wide, seeds[0])
    signless = codec.name.startswith("u")
    x = x.abs() if signless else x
    parts = kept(codec, x, None if seeds[1] is None else bits(numel, seeds[1]))
    scale = parts[1].double().repeat_interleave(codec.block_size)[:numel]
    some = scale > 0
    of_x, of_code = ((t.double() / scale)[some] for t in (x, read(codec, parts, x)))
    table = table_of(codec)
    assert (of_x.abs() <= table[-1] * (1 + 2.0**-14)).all(), "the largest has no code"
    above = torch.searchsorted(table, of_x).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    gap = high - low
    distance = torch.minimum((of_code - low).abs(), (of_code - high).abs())
    assert (distance <= 1e-3 * gap).all(), "not a neighbour"
    moved = signless & (of_x < table[1])  # which 0 is a neighbour of, that it may not become
    if seeds[1] is None or not codec.random:
        assert ((of_code - of_x).abs() <= 0.501 * gap)[~moved].all(), "not the nearer one"
    assert not signless or ((of_code > 0) == (of_x > 0)).all()


@quickly
@given(x=numbers, codec=st.sampled_from(KEPT + CODES))
def test_what_was_kept_stays(x: Tensor, codec: Codec) -> None:
    x = x.clamp(-60000, 60000)
    x = x.abs() if codec.name.startswith("u") else x
    parts = kept(codec, x, None)
    found = read(codec, parts, x)
    again = kept(codec, found, None)
    if codec.block_size:
        assert torch.equal(again[0], parts[0])
        torch.testing.assert_close(again[1], parts[1], rtol=1e-6, atol=0)  # a scale of float32 may be an ulp off
    else:
        assert torch.equal(read(codec, again, x), found)


shapes = st.lists(st.integers(1, 23), min_size=0, max_size=3).map(tuple)
state_dtypes = st.sampled_from([None, torch.float32, BF16, "int8", "int4"])
precisions = st.sampled_from(["storage", "stochastic", "kahan", "split24", "split32", "master"])


@quickly
@given(
    rule=st.sampled_from(RULES),
    shape=shapes,
    dtype=st.sampled_from([torch.float32, BF16, F16]),
    state_dtype=state_dtypes,
    precision=precisions,
    steps=st.integers(0, 2),
    seed=seeds,
)
def test_a_step_is_one_in_float32_whose_results_are_kept(
    rule: tuple[Case, str],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    state_dtype: Any,
    precision: str,
    steps: int,
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "MIN_QUANTIZED_NUMEL", 32)
        case, variant = rule
        options = case.variants[variant] | {"lr": 2.0**-7}
        precision = "storage" if dtype == torch.float32 else precision
        random = torch.Generator().manual_seed(seed)
        p = Parameter(torch.randn(shape, generator=random).to(dtype))
        own = {"state_dtype": state_dtype, "param_precision": precision, "seed": seed}
        optimizer = case.ours([p], **options, **own, backend="eager")
        started = optimizer.running_variant(*optimizer.param_groups).states
        # A number, or the parameter, with which a state starts is rounded as the state is: it is compared from then on.
        steps = max(steps, any(state.start != 0.0 for state in started))
        gradients = [torch.randn(shape, generator=random).to(dtype) for _ in range(steps + 1)]
        for g in gradients[:-1]:
            p.grad = g
            optimizer.step()
        # What there is now, in float32, and the last step of it.
        wide = Parameter(master(p, optimizer).float())
        plain = case.ours([wide], **options, backend="eager")
        if steps:
            plain.load_state_dict(copy.deepcopy(triton_optim.to_torch_state_dict(optimizer)))
        wide.grad = gradients[-1].float()
        plain.step()
        p.grad = gradients[-1]
        optimizer.step()

        key = row_key(seed, steps + 1, p.device).view(1)
        keys = tensor_keys(key, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
        index = torch.arange(p.numel()).view(shape)
        (group,) = optimizer.param_groups
        state = optimizer.state.get(p, {})
        names = optimizer.running_variant(group).state_names
        found = [codecs.parameter_codec(group, dtype)]
        found += [codecs.state_codec(optimizer, group, name, p) for name in names]
        for role, (name, codec) in enumerate(zip((None, *names), found, strict=True)):
            first = p.detach() if name is None else state[name]
            parts = [first, *(state[part] for part in part_names(codec, name))]
            value = wide.detach() if name is None else plain.state[wide][name]
            expected = [torch.zeros_like(part) for part in parts]
            write(codec, expected, value, role, bits_of_elements(keys[0], index))
            for part, wanted in zip(parts, expected, strict=True):
                assert torch.equal(part, wanted), (name, codec.name)
