"""What a prologue keeps, quantized or in bfloat16: Muon's momentum, and others' that are like their parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sharding import playing, sharded
from torch import Tensor
from torch.distributed.tensor import Replicate
from torch.nn import Parameter

import triton_optim
from triton_optim.core.memory import state_bytes
from triton_optim.precision.codecs import codes, read, write

# Those whose prologue keeps states like the parameter, and the names of these.
KEEP = {
    "Muon": ["momentum_buffer"],
    "NorMuon": ["momentum_buffer"],
    "AdaMuon": ["momentum_buffer", "second_momentum_buffer"],
    "MuonH": ["momentum_buffer"],
    "Scion": ["momentum_buffer"],
    "CAME": ["exp_avg"],
}
each = pytest.mark.parametrize("name", KEEP)
SHAPE = (64, 66)  # 4,224 elements: the last of the blocks is not full
BF16 = torch.bfloat16


def gradients(steps: int, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=random) for _ in range(steps)]


def steps(optimizer: Any, p: Parameter, given: list[Tensor]) -> None:
    for g in given:
        p.grad = g.clone()
        optimizer.step()


def parameter() -> Parameter:
    return Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)))


def held(optimizer: Any, p: Parameter, name: str, state_dtype: Any) -> Tensor:
    """A state as the next step reads it."""
    state = optimizer.state[p]
    if state_dtype == BF16:
        assert state[name].dtype == BF16
        return state[name].float()
    codec = codes(state_dtype, name == "second_momentum_buffer")
    return read(codec, [state[name], state[f"{name}_scale"]], p)


@each
@pytest.mark.parametrize("state_dtype", ["int8", "int4", BF16])
def test_steps_are_those_of_what_is_kept(name: str, state_dtype: Any) -> None:
    """Each goes from the rounded state as one in float32 does, to the bit, and rounds what that keeps."""
    p = parameter()
    q = Parameter(p.detach().clone())
    optimizer = getattr(triton_optim, name)([p], lr=0.1, state_dtype=state_dtype, backend="eager")
    exact = getattr(triton_optim, name)([q], lr=0.1, backend="eager")
    for g in gradients(4):
        steps(optimizer, p, [g])
        steps(exact, q, [g])
        assert torch.equal(p, q)
        for part in KEEP[name]:
            kept, value = held(optimizer, p, part, state_dtype), exact.state[q][part]
            error = (kept - value).abs()
            if state_dtype == "int8":
                codec = codes("int8", part == "second_momentum_buffer")
                own = [torch.zeros_like(t) for t in (optimizer.state[p][part], optimizer.state[p][f"{part}_scale"])]
                write(codec, own, value)
                assert torch.equal(own[0], optimizer.state[p][part])
            elif state_dtype == BF16:
                assert (error <= 2**-7 * value.abs()).all()  # to one of the two numbers beside it
                assert (error > 2**-9 * value.abs()).any()  # and not always to the nearer
            assert error.max() > 0
            value.copy_(kept)


def test_on_every_backend(backend: str) -> None:
    """What comes before the rule is the same in front of each."""
    ends = []
    for own in ("eager", backend):
        p = parameter()
        optimizer = triton_optim.Muon([p], lr=0.1, state_dtype="int8", backend=own)
        steps(optimizer, p, gradients(3))
        ends.append((p.detach(), optimizer.state[p]["momentum_buffer"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-7)
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name", ["Muon", "AdaMuon", "CAME"])
@pytest.mark.parametrize("state_dtype", ["int8", "int4", BF16])
def test_a_resumed_run_goes_on_as_it_would_have(name: str, state_dtype: Any) -> None:
    def build(value: Tensor) -> tuple[Parameter, Any]:
        p = Parameter(value.clone())
        return p, getattr(triton_optim, name)([p], lr=0.1, state_dtype=state_dtype, seed=5, backend="eager")

    p, optimizer = build(parameter().detach())
    steps(optimizer, p, gradients(3))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = saved["state"][0][KEEP[name][0]]
    assert state_dtype == BF16 or set(kept) == {"codes", "scale", "bits", "signed", "block", "version"}
    q, resumed = build(p.detach())
    resumed.load_state_dict(saved)
    for own, which in ((p, optimizer), (q, resumed)):
        steps(which, own, gradients(3, seed=1))
    assert torch.equal(p, q)
    for part, value in optimizer.state[p].items():
        assert torch.equal(value, resumed.state[q][part]), part


def test_bfloat16_is_rounded_stochastically() -> None:
    """Of a number between two of bfloat16 the mean is right, each time, and the seed decides which become which."""
    kept = []
    for seed in (0, 0, 1):
        p = parameter()
        optimizer = triton_optim.Muon([p], momentum=0.0, state_dtype=BF16, seed=seed, backend="eager")
        steps(optimizer, p, [torch.full(SHAPE, 1 + 2**-9)] * 2)
        kept.append(optimizer.state[p]["momentum_buffer"].float())
        assert set(kept[-1].unique().tolist()) == {1.0, 1 + 2**-7}
        assert kept[-1].mean() == pytest.approx(1 + 2**-9, abs=4 * 2**-7 * (3 / 16 / p.numel()) ** 0.5)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_states_are_converted_where_the_group_says_another() -> None:
    p = parameter()
    optimizer = triton_optim.Muon([p], backend="eager")
    dtypes = []
    for state_dtype in (None, "int8", "int4", BF16, torch.float32, None):
        optimizer.param_groups[0]["state_dtype"] = state_dtype
        steps(optimizer, p, gradients(1))
        state = optimizer.state[p]
        dtypes.append((state["momentum_buffer"].dtype, "momentum_buffer_scale" in state))
    full, codes_of = (torch.float32, False), (torch.int8, True)
    assert dtypes == [full, codes_of, codes_of, (BF16, False), full, full]


def test_states_of_full_precision_are_loaded_into_codes_and_back() -> None:
    p = parameter()
    exact = triton_optim.Muon([p], backend="eager")
    steps(exact, p, gradients(3))
    value = exact.state[p]["momentum_buffer"].clone()
    coded = triton_optim.Muon([p], state_dtype="int8", backend="eager")
    triton_optim.load_torch_state_dict(coded, copy.deepcopy(exact.state_dict()))
    assert coded.state[p]["momentum_buffer"].dtype == torch.int8
    back = triton_optim.to_torch_state_dict(coded)["state"][0]
    assert back.keys() == {"momentum_buffer"}
    assert (back["momentum_buffer"] - value).abs().max() <= value.abs().max() / 127
    torch.optim.Muon([p]).load_state_dict(triton_optim.to_torch_state_dict(coded))


@each
@pytest.mark.parametrize("state_dtype", ["int8", BF16])
def test_memory_is_what_is_reported(name: str, state_dtype: Any) -> None:
    p = parameter()
    optimizer = getattr(triton_optim, name)([p], state_dtype=state_dtype, backend="eager")
    report = triton_optim.memory_report(optimizer)
    steps(optimizer, p, gradients(1))
    counts = optimizer.state[p]["step"].nbytes if "step" in optimizer.state[p] else 0
    assert sum(report.states.values()) == state_bytes(optimizer) - counts
    for part in KEEP[name]:
        assert report.torch_states[part] == 4 * p.numel()
        assert report.states[part] < (1.05 if state_dtype == "int8" else 2.05) * p.numel()


def test_what_stays_in_float32() -> None:
    """Of few elements, or where memory lies otherwise, states stay in float32; AdamW's groups have quantized ones."""
    small, turned, bias = Parameter(torch.ones(4, 4)), Parameter(torch.ones(66, 64).t()), Parameter(torch.ones(4200))
    params = [small, turned, bias]
    groups = [{"params": params[:2]}, {"params": params[2:], "use_muon": False}]
    optimizer = triton_optim.Muon(groups, state_dtype="int8", backend="eager")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[small]["momentum_buffer"].dtype == torch.float32
    assert optimizer.state[turned]["momentum_buffer"].dtype == torch.float32
    assert optimizer.state[bias]["exp_avg"].dtype == torch.int8


def test_codes_of_other_parameters_are_refused() -> None:
    p, q = parameter(), Parameter(torch.ones(70, 64))
    optimizer = triton_optim.Muon([p], state_dtype="int8", backend="eager")
    steps(optimizer, p, gradients(1))
    other = triton_optim.Muon([q], state_dtype="int8", backend="eager")
    with pytest.raises(RuntimeError, match=r"momentum_buffer of parameter 0 has items of shape \(4352,\)"):
        other.load_state_dict(optimizer.state_dict())
    optimizer.state[p]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(RuntimeError, match="momentum_buffer of parameter 0"):
        steps(optimizer, p, gradients(1))


def test_a_training_loses_nothing() -> None:
    """A regression, whose loss after so many steps is the same but for a hundredth."""
    random = torch.Generator().manual_seed(0)
    truth, x = torch.randn(SHAPE, generator=random), torch.randn(256, SHAPE[1], generator=random)
    losses = []
    for state_dtype in (None, "int8"):
        p = Parameter(torch.zeros(SHAPE))
        optimizer = triton_optim.Muon([p], lr=0.1, weight_decay=0.0, state_dtype=state_dtype, backend="eager")
        for step in range(25):
            optimizer.param_groups[0]["lr"] = 2.0 * (1 - step / 25)
            optimizer.zero_grad()
            loss = (x @ (p - truth).T).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1] < 0.05 * (x @ truth.T).square().mean()


@pytest.mark.parametrize("dtype", [BF16, "int8"], ids=["bfloat16", "int8"])
def test_sharded_parameters_are_coded_as_others(dtype: Any, device: torch.device) -> None:
    start, *given = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    ends = []
    with playing(0, device) as mesh:
        for place in (torch.clone, lambda x: sharded(x, mesh, [Replicate()])):
            p = Parameter(place(start))
            optimizer = triton_optim.AdaMuon([p], lr=0.1, state_dtype=dtype, backend="eager")
            for g in given:
                p.grad = place(g)
                optimizer.step()
            ends.append(p.detach())
            assert optimizer.state[p]["momentum_buffer"].dtype == (torch.int8 if dtype == "int8" else BF16)
        assert torch.equal(ends[0], ends[1].to_local())


@pytest.mark.parametrize("name", ["AdafactorRelative", "Adafactor"])
def test_refused_where_nothing_is_like_the_parameter(name: str) -> None:
    with pytest.raises(RuntimeError, match='state_dtype="int8" is for states like their parameter'):
        getattr(triton_optim, name)([parameter()], state_dtype="int8")
