"""Stochastic rounding: right on average, exact where that is possible, and the same bits everywhere; state dtypes."""

import copy
import math
from typing import Any

import pytest
import torch
from codec_training import everything, go_on
from side_by_side import nearest_roots
from table import CASES, KINDS, Case, rows
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.precision.codecs import stochastic, write
from triton_optim.precision.random_bits import bits_of_elements, host_row_key, row_key, tensor_keys

pytestmark = pytest.mark.usefixtures("two_slots")

HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(37, 5), (3,), (), (40, 33), (0, 2)]
# Rules that keep their states themselves, and take dense gradients.
RULES = [case for case in KINDS if case.elementwise and not case.sparse]


def rounded(
    x: Tensor, dtype: torch.dtype, role: int = 0, seed: int = 0, step: int = 1, number: int = 0, first: int = 0
):
    """Each element rounded once, as the eager backend does it: a tensor of `dtype`."""
    numbers, start = torch.tensor([number], dtype=torch.int32), torch.tensor([first])
    keys = tensor_keys(row_key(seed, step, x.device).view(1), numbers, start)
    kept = torch.empty_like(x, dtype=dtype)
    write(stochastic(dtype), [kept], x, role, bits_of_elements(keys[0], torch.arange(x.numel())))
    return kept


def draws(x: Tensor, dtype: torch.dtype) -> Tensor:
    return rounded(x, dtype).float()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("x", [1.001, -1.001, 3.3e-3, 1e-30, -7e-6, 1e-7, 60001.0, 1 / 3])
def test_mean_is_exact(x: float, dtype: torch.dtype) -> None:
    n = 10_000
    found = draws(torch.full((n,), x), dtype)
    assert torch.equal(found, found.to(dtype).float()), "not a value of the dtype"
    values = found.unique()
    assert len(values) <= 2
    exact = float(torch.tensor(x))
    if len(values) == 2:
        gap = float(values[1] - values[0])
        assert values[0] < exact < values[1]
        up = (exact - float(values[0])) / gap
        assert abs(float(found.double().mean()) - exact) < 3 * gap * math.sqrt(up * (1 - up) / n)
    else:  # nearer to one of them than 10,000 draws can show
        assert abs(float(values[0]) - exact) < max(abs(exact) * 2**-7, 2**-24) if dtype == torch.float16 else True


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_of_the_dtype_stays(dtype: torch.dtype) -> None:
    """Subnormal ones, Inf and NaN among them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    found = draws(every, dtype)
    assert torch.equal(found[~every.isnan()], every[~every.isnan()])
    assert found[every.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_finite_stays_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    between = largest * (1 + torch.finfo(dtype).eps / 2 * 0.999)
    x = torch.full((1000,), between if dtype == torch.float16 else torch.finfo(torch.float32).max)
    assert (draws(x, dtype) == largest).all()
    assert (draws(-x, dtype) == -largest).all()


def test_bits_depend_on_seed_step_parameter_role_and_element() -> None:
    def bits(role: int = 0, **key: int) -> Tensor:
        kept = rounded(torch.full((10_000,), 1 + 2**-8), torch.bfloat16, role, **key)
        return (kept.float() > 1).double()  # up or down: a coin

    one = bits()
    assert torch.equal(one, bits())
    others = [
        bits(seed=1),
        bits(seed=2**40),
        bits(seed=-1),
        bits(step=2),
        bits(number=1),
        bits(first=2**33),
        *(bits(role=role) for role in range(1, 6)),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 0.04  # 4 sigma
    assert torch.equal(bits(first=5)[:-5], one[5:])
    assert abs(torch.corrcoef(torch.stack((one[1:], one[:-1])))[0, 1]) < 0.04


def trained(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device, steps: range = range(3), **options: Any
) -> tuple[list[Parameter], triton_optim.RuleOptimizer]:
    random = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=random).to(device, dtype)) for shape in SHAPES]
    optimizer = case.ours(params, **(case.settings | options), backend=backend)
    go_on(params, optimizer, steps)
    return params, optimizer


STOCHASTIC = {"param_precision": "stochastic", "state_dtype": torch.bfloat16}


@rows(*(case for case in RULES if case.on_every_backend))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed:UserWarning")  # Inductor's, when it compiles
def test_same_bits_on_every_backend(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """In those elements, too, in which two backends' arithmetic agrees: all but a few in thousands."""
    if backend == "compiled" and (case.name != "AdamW" or dtype != torch.bfloat16):
        pytest.skip("each takes seconds to compile, and the bits are the same for every rule; see test_codecs.py")
    ends = [everything(*trained(case, b, dtype, device, **STOCHASTIC)) for b in ("eager", backend)]
    different = sum(int((a != b).sum()) for a, b in zip(*ends, strict=True))
    assert different <= 0.002 * sum(a.numel() for a in ends[0])


@rows(*RULES)
def test_same_bits_captured_and_resumed(case: Case, device: torch.device) -> None:
    params, optimizer = trained(case, "eager", torch.bfloat16, device, range(4), **STOCHASTIC)
    expected = everything(params, optimizer)
    captured = everything(*trained(case, "eager", torch.bfloat16, device, range(4), capturable=True, **STOCHASTIC))
    for a, b in zip(expected[: len(SHAPES)], captured, strict=False):
        assert torch.equal(a, b)
    params, optimizer = trained(case, "eager", torch.bfloat16, device, range(2), **STOCHASTIC)
    twins = [Parameter(p.detach().clone()) for p in params]
    resumed = case.ours(twins, **case.settings, **STOCHASTIC, backend="eager")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go_on(twins, resumed, range(2, 4))
    for a, b in zip(expected, everything(twins, resumed), strict=True):
        assert torch.equal(a, b)


MANY_ROLES = {
    "amsgrad and an average": (triton_optim.AdamW, {"amsgrad": True, "ema_decay": 0.9, "ema_dtype": torch.bfloat16}),
    "four states": (
        triton_optim.RMSprop,
        {"centered": True, "momentum": 0.9, "ema_decay": 0.9, "ema_dtype": torch.bfloat16},
    ),
}


@pytest.mark.parametrize("name", MANY_ROLES)
def test_roles_beyond_the_fourth_have_the_same_bits_on_every_backend(
    name: str, backend: str, device: torch.device
) -> None:
    if backend == "compiled" and name == "four states":
        pytest.skip("takes seconds to compile, and the other has as many roles")
    cls, options = MANY_ROLES[name]
    ends = []
    for which in ("eager", backend):
        params = [Parameter(torch.randn(1027, generator=torch.Generator().manual_seed(0)).to(device))]
        with nearest_roots():
            optimizer = cls(params, lr=1e-2, **options, backend=which)
            go_on(params, optimizer, range(2))
        ends.append(optimizer.state[params[0]]["ema"])
    different = int((ends[0] != ends[1]).sum())
    # On a GPU a quotient may be 2 ulp off, and of 16 bits that are cut off, so few numbers round another way.
    assert different <= (0 if device.type == "cpu" else 2)


@rows(*RULES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_kept_in_the_dtype(case: Case, state_dtype: torch.dtype, device: torch.device) -> None:
    """Parameters of float32 with states of bfloat16, and the other way round."""
    dtype = torch.bfloat16 if state_dtype == torch.float32 else torch.float32
    params, optimizer = trained(case, "eager", dtype, device, state_dtype=state_dtype)
    names = optimizer.variant(optimizer.param_groups[0]).state_names
    for p in params:
        assert p.dtype == dtype
        assert all(optimizer.state[p][name].dtype == state_dtype for name in names)
    assert state_dtype == torch.float32 or "step" in optimizer.state[params[0]]


def test_float32_states_of_bfloat16_parameters_lose_nothing(backend: str, device: torch.device) -> None:
    (case,) = (case for case in CASES if case.name == "AdamW")
    params, optimizer = trained(case, backend, torch.bfloat16, device, range(6), state_dtype=torch.float32)
    wide = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    for k in range(6):
        random = torch.Generator().manual_seed(1 + k)
        for m in wide:
            g = torch.randn(m.shape, generator=random).to(torch.bfloat16).double()
            m.mul_(0.9).add_(g, alpha=0.1)
    for p, m in zip(params, wide, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double().cpu(), m, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_updates_are_lost_to_the_nearest_and_kept_on_average(
    dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    if backend == "compiled" and dtype != torch.bfloat16:
        pytest.skip("takes seconds to compile, and bits are added alike")
    steps = 40 if backend == "triton" and device.type == "cpu" else 200  # the interpreter is slow
    ends = {}
    for precision in ("storage", "stochastic"):
        p = Parameter(torch.ones(1024, dtype=dtype, device=device))
        p.grad = torch.ones_like(p)
        optimizer = triton_optim.SGD([p], lr=2.0**-13, param_precision=precision, backend=backend)
        for _ in range(steps):
            optimizer.step()
        ends[precision] = float(p.detach().float().mean())
    assert ends["storage"] == 1.0
    assert abs(ends["stochastic"] - (1 - steps * 2.0**-13)) < 1e-3


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_parameters_after_a_prologue(name: str, backend: str, device: torch.device) -> None:
    p = Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
    optimizer = getattr(triton_optim, name)([p], lr=1e-4, param_precision="stochastic", backend=backend)
    p.grad = torch.randn(64, 64, device=device).to(torch.bfloat16)
    optimizer.step()
    assert len(p.detach().unique()) > 1


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("step", [1, 2, 1000, 2**31 - 1])
def test_the_host_forms_the_key_of_a_row_as_tensors_do(seed, step):
    assert host_row_key(seed, step) == row_key(seed, step, torch.device("cpu")).item()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("cls", [triton_optim.AdamW, triton_optim.SGD, triton_optim.Adagrad])
def test_bits_go_on_where_float32_cannot_count(
    cls: type[triton_optim.RuleOptimizer], capturable: bool, backend: str, device: torch.device
) -> None:
    """From a checkpoint of torch's, whose count stands still there, and back into torch."""
    if backend == "compiled":
        pytest.skip("its keys are made as the eager backend's")
    theirs = getattr(torch.optim, cls.__name__)
    q = Parameter(torch.ones(512, device=device))
    saver = theirs([q], lr=1e-3)
    q.grad = torch.ones_like(q)
    saver.step()
    saved = saver.state_dict()
    saved["state"].setdefault(0, {})["step"] = torch.tensor(2.0**24)
    p = Parameter(torch.ones(512, device=device, dtype=torch.bfloat16))
    optimizer = cls([p], lr=1e-3, param_precision="stochastic", capturable=capturable, backend=backend)
    optimizer.load_state_dict(saved)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append(p.detach().clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert optimizer.state[p]["step"] == 2**24 + 3
    back = theirs([q], lr=1e-3)
    back.load_state_dict(optimizer.state_dict())
    back.step()
    assert q.isfinite().all()


@pytest.mark.parametrize("cls", [triton_optim.AdamW, triton_optim.NAdam])
def test_counts_of_what_is_not_rounded_stochastically_are_torchs(cls: type, device: torch.device) -> None:
    p = Parameter(torch.ones(4, device=device, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    dtypes = []
    for precision in ("master", "stochastic"):
        optimizer = cls([p], param_precision=precision, ema_decay=0.9, backend="eager")
        optimizer.step()
        dtypes.append({n: v.dtype for n, v in optimizer.state[p].items() if not v.dim()})
    assert set(dtypes[0].values()) == {torch.float32}
    assert {name for name, dtype in dtypes[1].items() if dtype == torch.float64} == {"step", "n_averaged"}
