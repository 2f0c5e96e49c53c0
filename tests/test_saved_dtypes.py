"""States in other dtypes than the parameter's, and of other layouts, through a checkpoint: bit for bit."""

import copy
import itertools

import pytest
import torch
from conftest import CPP, TRITON
from side_by_side import assert_same, ours, peer, train, values
from state_dicts import ADAMW, assert_bitwise, assert_same_states, through_a_file
from table import KINDS, each_kind, each_kind_and_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@each_kind_and_backend
def test_layout_of_the_state_survives(case, backend, device):
    """Channels-last moments read as contiguous would be moments of other elements."""

    def laid_out():
        (p,) = case.parameters(device, shapes=((4, 3) if case.matrices else (2, 3, 4, 5),))
        p.data = p.data.t().contiguous().t() if case.matrices else p.data.to(memory_format=torch.channels_last)
        return [p]

    params, resumed, theirs = laid_out(), laid_out(), laid_out()
    opt, other, torchs = ours(case, params, backend), ours(case, resumed, backend), peer(case, theirs)
    train(case, range(2), (params, opt), (theirs, torchs))
    other.load_state_dict(through_a_file(opt.state_dict()))
    strides = [
        {key: v.stride() for key, v in o.state_dict()["state"][0].items() if key not in case.numbers}
        for o in (opt, other)
    ]
    assert strides[0] == strides[1]
    resumed[0].data = params[0].data.clone()
    train(case, range(2, 4), (params, opt), (resumed, other), (theirs, torchs))
    assert_same(case, other, opt, rtol=0, atol=0)
    assert_same(case, opt, torchs)


# Dtypes


def awkward(shape, dtype, seed):
    """Random values with the ones among them that casts lose or canonicalise."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1 / 3, torch.finfo(dtype).tiny, torch.finfo(dtype).max]
    flat = tensor.reshape(-1)
    flat[: len(special)] = torch.tensor(special, dtype=torch.float64).to(dtype)[: flat.numel()]
    return tensor


@each_kind
@pytest.mark.parametrize("p_dtype", DTYPES)
@pytest.mark.parametrize("s_dtype", DTYPES)
def test_every_state_is_restored_in_its_own_dtype_bit_for_bit(case, p_dtype, s_dtype, device):
    params = case.parameters(device, p_dtype)
    opt = ours(case, params, "eager")
    train(case, range(1), (params, opt))
    for i, p in enumerate(params):
        for key, value in opt.state[p].items():
            if key not in case.numbers:
                opt.state[p][key] = awkward(value.shape, s_dtype, seed=i).to(device)
    saved = copy.deepcopy(opt.state_dict())
    assert {v.dtype for s in saved["state"].values() for key, v in s.items() if key not in case.numbers} == {s_dtype}
    for reload in (lambda: saved, lambda: through_a_file(saved)):
        other = ours(case, case.parameters(device, p_dtype), "eager")
        other.load_state_dict(reload())
        assert_same_states(other.state_dict(), saved)


@each_kind
@pytest.mark.parametrize("p_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_codes_of_a_state_stay_integers(case, p_dtype, dtype, device):
    """Whatever else a state holds, the quantized codes and scales of a codec say."""
    params = case.parameters(device, p_dtype)
    opt = ours(case, params, "eager")
    train(case, range(1), (params, opt))
    for i, p in enumerate(params):
        opt.state[p]["codes"] = torch.randint(0, 2, (7,), generator=torch.Generator().manual_seed(i)).to(device, dtype)
    saved = copy.deepcopy(opt.state_dict())
    other = ours(case, case.parameters(device, p_dtype), "eager")
    other.load_state_dict(saved)
    assert_same_states(other.state_dict(), saved)


DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
MIXED = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.bfloat16)]
HALVES = [pair for pair in DTYPE_PAIRS if pair[0] != pair[1] and pair[1].itemsize == 2]
# The interpreter is slow, and a compilation takes seconds: the conversions are the same for every rule.
RESUMED = [
    pytest.param(case, pinned, *pair, marks=marks, id="-".join([case.name, pinned, *(str(d)[6:] for d in pair)]))
    for case in KINDS
    for pinned, pairs, marks in (
        ("eager", DTYPE_PAIRS if case.on_every_backend else MIXED, ()),
        ("triton", HALVES + MIXED[:1] if case is ADAMW else MIXED if case.on_every_backend else [], TRITON),
        ("compiled", MIXED[:1] if case is ADAMW else [], ()),
        ("cpp", MIXED if case is ADAMW else [], CPP),
    )
    for pair in pairs
]


@pytest.mark.parametrize(("case", "pinned", "p_dtype", "s_dtype"), RESUMED)
def test_training_resumes_bit_for_bit_with_states_of_another_dtype(case, pinned, p_dtype, s_dtype, device):
    params, eager = case.parameters(device, p_dtype), case.parameters(device, p_dtype)
    opt, reference = ours(case, params, pinned), ours(case, eager, "eager")
    train(case, range(1), (params, opt), (eager, reference))
    for optimizer, model in ((opt, params), (reference, eager)):
        for p in model:
            for key, value in optimizer.state[p].items():
                if key not in case.numbers:
                    optimizer.state[p][key] = value.to(s_dtype)
    train(case, range(1, 2), (params, opt), (eager, reference))
    resumed = [torch.nn.Parameter(value) for value in values(params)]
    other = ours(case, resumed, pinned)
    other.load_state_dict(through_a_file(opt.state_dict()))
    train(case, range(2, 4), (params, opt), (resumed, other), (eager, reference))
    for p, q in zip(params, resumed, strict=True):
        assert_bitwise(q, p)
    saved = opt.state_dict()
    assert_same_states(other.state_dict(), saved)
    assert {v.dtype for s in saved["state"].values() for key, v in s.items() if key not in case.numbers} == {s_dtype}
    # Nor are they bit for bit the same nonsense: a few roundings, of values of order 1, from the eager backend.
    rounding = 4 * max(torch.finfo(p_dtype).eps, torch.finfo(s_dtype).eps)
    assert_same(case, opt, reference, rtol=rounding, atol=rounding)
