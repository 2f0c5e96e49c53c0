"""Checkpoints of what codecs keep: exact, into other codecs, to torch and back, into other options."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codec_training import ADAMW, BF16, KEPT, RULES, SHAPES, everything, go_on, kept, kept_on_backends, trained
from table import KINDS, Case
from torch import Tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.core.convert import master
from triton_optim.precision.codecs import codes, new_parts

HALVES = [torch.bfloat16, torch.float16]
CORRECTED = ["kahan", "split24", "split32", "master"]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@kept_on_backends
def test_a_checkpoint_is_exact(name: str, backend: str, device: torch.device) -> None:
    """Through torch.save, into a fresh optimizer, and on from there."""
    params, optimizer = trained(triton_optim.AdamW, name, backend, device, **ADAMW.settings)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twins = [Parameter(p.detach().clone()) for p in params]
    resumed = triton_optim.AdamW(twins, **KEPT[name][1], backend=backend)
    resumed.load_state_dict(loaded)
    assert_same(everything(params, optimizer), everything(twins, resumed))
    go_on(params, optimizer, range(3, 5))
    go_on(twins, resumed, range(3, 5))
    assert_same(everything(params, optimizer), everything(twins, resumed))


@kept
def test_a_parameter_that_is_in_no_group_is_copied_with_its_state(name: str, device: torch.device) -> None:
    """Of which a group that was removed may come back."""
    params, optimizer = trained(triton_optim.AdamW, name, "eager", device, **ADAMW.settings)
    group = optimizer.param_groups.pop()
    params, copied = copy.deepcopy((params, optimizer))
    copied.param_groups.append(copy.deepcopy(group) | {"params": params})
    assert_same(everything(group["params"], optimizer), everything(params, copied))
    optimizer.param_groups.append(group)
    go_on(params, copied, range(3, 5))
    go_on(group["params"], optimizer, range(3, 5))
    assert_same(everything(group["params"], optimizer), everything(params, copied))


@kept
@pytest.mark.parametrize("into", KEPT)
def test_from_every_codec_into_every_other(name: str, into: str, device: torch.device) -> None:
    """By a checkpoint; nothing is lost but what the narrower one cannot hold."""
    params, optimizer = trained(triton_optim.AdamW, name, "eager", device)
    if KEPT[into][0] != KEPT[name][0]:
        pytest.skip("this codec is of parameters of another dtype")
    twins = [Parameter(p.detach().clone()) for p in params]
    other = triton_optim.AdamW(twins, **KEPT[into][1], backend="eager")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in other.param_groups:
        group["lr"], group["betas"] = 0.0, (1.0 - 1e-12, 1.0 - 1e-12)  # a step that moves nothing
    for p in twins:
        p.grad = torch.zeros_like(p)
    other.step()
    before, after = triton_optim.to_torch_state_dict(optimizer), triton_optim.to_torch_state_dict(other)
    for i in range(len(SHAPES)):
        for state in ("exp_avg", "exp_avg_sq"):
            a, b = before["state"][i][state].double(), after["state"][i][state].double()
            tolerance = 0.3 if "int4" in into else 0.02
            assert float((a - b).abs().max()) <= tolerance * float(a.abs().max())
    for p, q in zip(params, twins, strict=True):
        a, b = (master(p, optimizer).double(), master(q, other).double())
        if KEPT[into][1].get("param_precision") in CORRECTED:
            torch.testing.assert_close(a, b, rtol=2.0**-15, atol=1e-6)
        names = {suffix for suffix in other.state[q] if suffix in triton_optim.precision.codecs.RESIDUALS}
        assert names == set(triton_optim.precision.codecs.parameter_codec(KEPT[into][1], q.dtype).suffixes)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{name}-{case.name}")
        for case in RULES
        for name in ("int8", "stochastic int8", "split32", "master")
        if name == "int8" or case in KINDS
    ],
)
def test_to_torch_and_back(case: Case, name: str, device: torch.device) -> None:
    if case.settings.get("centered") and "state_dtype" in KEPT[name][1]:
        pytest.skip("centered needs exact states")
    params, optimizer = trained(case.ours, name, "eager", device, **case.settings)
    before = everything(params, optimizer)
    saved = triton_optim.to_torch_state_dict(optimizer)
    assert_same(before, everything(params, optimizer))
    wide = [Parameter(master(p, optimizer).float()) for p in params]
    theirs = case.peer(wide, **case.settings)
    theirs.load_state_dict(copy.deepcopy(saved))
    fresh = case.peer([Parameter(p.detach().clone()) for p in wide], **case.settings)
    go_on([p for group in fresh.param_groups for p in group["params"]], fresh, range(1))
    for p, q in zip(wide, (p for group in fresh.param_groups for p in group["params"]), strict=True):
        assert theirs.state[p].keys() == fresh.state[q].keys()
    go_on(wide, theirs, range(3, 4))
    back = case.ours(params, **(case.settings | KEPT[name][1]), backend="eager")
    triton_optim.load_torch_state_dict(back, saved)
    for p in params:
        names = back.variant(back.param_groups[0]).state_names
        for state in names:
            a, b = optimizer.state[p][state], back.state[p][state]
            assert a.dtype == b.dtype
            if a.dtype == torch.int8:
                mask = 0xFF if back.is_nonnegative(state) else -1
                difference = (a.short() & mask) - (b.short() & mask)
                assert int(difference.abs().max()) <= 1  # the scale may be an ulp off
            else:
                assert torch.equal(a, b)


def test_options_may_change_in_mid_training(backend: str, device: torch.device) -> None:
    params, optimizer = trained(triton_optim.AdamW, "kahan", backend, device)
    value = master(params[0], optimizer)
    group = optimizer.param_groups[0]
    group["param_precision"], group["state_dtype"] = "split32", "int8"
    saved = triton_optim.to_torch_state_dict(optimizer)["state"][0]["exp_avg"]
    group["lr"] = 0.0
    go_on(params, optimizer, range(3, 4))
    assert "compensation" not in optimizer.state[params[0]]
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8
    assert torch.equal(master(params[0], optimizer), value)
    random = torch.Generator().manual_seed(4)
    g = torch.randn(SHAPES[0], generator=random).to(device, BF16).float()
    found = triton_optim.to_torch_state_dict(optimizer)["state"][0]["exp_avg"]
    torch.testing.assert_close(found, 0.9 * saved + 0.1 * g, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", [name for name in KEPT if KEPT[name][0] in HALVES])
def test_float32_weights_out_and_in(name: str, device: torch.device) -> None:
    dtype, options = KEPT[name]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.BatchNorm1d(80)).to(device, dtype)
    optimizer = triton_optim.AdamW(model.parameters(), lr=1e-3, **options, backend="eager")
    go_on(list(model.parameters()), optimizer, range(3))
    weights = triton_optim.master_state_dict(model, optimizer)
    assert weights.keys() == model.state_dict().keys()
    assert weights["1.num_batches_tracked"].dtype == torch.int64
    assert weights["1.running_mean"].dtype == dtype
    assert all(weights[n].dtype == torch.float32 for n, _ in model.named_parameters())
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        torch.nn.init.zeros_(p)
    fresh = triton_optim.AdamW(twin.parameters(), lr=1e-3, **options, backend="eager")
    triton_optim.load_master_state_dict(twin, fresh, weights)
    again = triton_optim.master_state_dict(twin, fresh)
    exact = options["param_precision"] in CORRECTED
    for n, p in model.named_parameters():
        if exact:
            assert torch.equal(weights[n], again[n])
        torch.testing.assert_close(again[n], p.detach().float(), rtol=2.0**-8, atol=1e-6)
    go_on(list(twin.parameters()), fresh, range(3, 5))
    assert int(fresh.state[next(twin.parameters())]["step"]) == 2
    with pytest.raises(RuntimeError, match="Missing key"):
        triton_optim.load_master_state_dict(twin, fresh, {})


def test_the_first_step_of_momentum_after_loading_weights() -> None:
    """Corrections are there, but no step has been: the buffer starts with the gradient, undampened."""
    model = torch.nn.Linear(8, 8, bias=False, dtype=BF16)
    optimizer = triton_optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, param_precision="master", backend="eager"
    )
    triton_optim.load_master_state_dict(model, optimizer, {"weight": torch.ones(8, 8)})
    model.weight.grad = torch.ones(8, 8, dtype=BF16)
    optimizer.step()
    assert (optimizer.state[model.weight]["momentum_buffer"] == 1).all()


def test_another_block_size_is_read() -> None:
    """A checkpoint whose scales are for 64 elements each, as another version might write them."""
    params, optimizer = trained(triton_optim.AdamW, "int8", "eager", torch.device("cpu"))
    saved = copy.deepcopy(optimizer.state_dict())
    for i in (0, 1):
        for name, nonnegative in (("exp_avg", False), ("exp_avg_sq", True)):
            small = codes("int8", nonnegative)._replace(elements_per_item=(1, 64))
            value = triton_optim.to_torch_state_dict(optimizer)["state"][i][name]
            parts = dict(zip(("codes", "scale"), new_parts(small, value.flatten()), strict=True))
            saved["state"][i][name] |= parts | {"block": 64}
    twins = [Parameter(p.detach().clone()) for p in params]
    other = triton_optim.AdamW(twins, state_dtype="int8", backend="eager")
    other.load_state_dict(saved)
    go_on(params, optimizer, range(3, 4))
    go_on(twins, other, range(3, 4))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert other.state[twins[0]]["exp_avg_scale"].shape == (20,)


@pytest.mark.parametrize(
    "broken",
    [
        lambda kept: kept.update(scale=kept["scale"][:-1]),
        lambda kept: kept.update(codes=kept["codes"][:-256]),
        lambda kept: kept.update(codes=kept["codes"].float()),
    ],
)
def test_codes_of_another_model_are_refused(broken: Callable[[dict[str, Any]], Any]) -> None:
    params, optimizer = trained(triton_optim.AdamW, "int8", "eager", torch.device("cpu"))
    saved = copy.deepcopy(optimizer.state_dict())
    broken(saved["state"][0]["exp_avg"])
    before = everything(params, optimizer)
    with pytest.raises(RuntimeError, match="scales"):
        optimizer.load_state_dict(saved)
    assert_same(before, everything(params, optimizer))
