"""Gradient scalers and max_grad_norm: what the step does with all gradients alike, and what a skipped step leaves."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from amp_steps import SCALE, each_backend, give, new_scaler, parameters
from compared import assert_same_bits, bits
from complaints import explains

import triton_optim

BF16 = torch.bfloat16
SCALERS = {"torch's": torch.amp.GradScaler, "ours": triton_optim.GradScaler}
each_scaler = pytest.mark.parametrize("scaler_class", list(SCALERS.values()), ids=list(SCALERS))
STOCHASTIC = {"param_precision": "stochastic", "state_dtype": BF16, "ema_decay": 0.9, "ema_dtype": BF16}


# Scalers


@each_scaler
@pytest.mark.parametrize("clip", [False, True])
def test_the_ordinary_flow_of_a_scaler_is_torchs(scaler_class, clip, backend, device):
    """scale, backward, unscale_, clip, step, update; without the option amp."""
    model = torch.nn.Linear(6, 4).to(device)
    theirs = copy.deepcopy(model)
    opts = [
        triton_optim.SGD(model.parameters(), lr=0.1, momentum=0.9, backend=backend),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9),
    ]
    scalers = [scaler_class(device.type, init_scale=SCALE), torch.amp.GradScaler(device.type, init_scale=SCALE)]
    for k in range(4):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(k)).to(device)
        if k == 2:
            x[0, 0] = math.inf
        for own, opt, scaler in zip((model, theirs), opts, scalers, strict=True):
            opt.zero_grad()
            scaler.scale(own(x).square().sum()).backward()
            if clip:
                scaler.unscale_(opt)
                norm = triton_optim.clip_grad_norm_ if own is model else torch.nn.utils.clip_grad_norm_
                norm(own.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == SCALE / 2
    torch.testing.assert_close(list(model.parameters()), list(theirs.parameters()))


@each_scaler
@each_backend
def test_a_fused_step_unscales_and_writes_no_gradient(scaler_class, backend, device):
    params, plain = parameters(device), parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, momentum=0.9, amp="fused", backend=backend)
    without = triton_optim.SGD(plain, lr=0.1, momentum=0.9, backend=backend)
    scaler = new_scaler(scaler_class, device)
    for k in range(3):
        give(params, k, SCALE)
        give(plain, k)
        before, versions = [p.grad.clone() for p in params], [p.grad._version for p in params]
        scaler.step(opt)
        scaler.update()
        without.step()
        assert_same_bits([p.grad for p in params], before)
        if scaler_class is triton_optim.GradScaler:
            assert [p.grad._version for p in params] == versions
        assert opt.skipped == 0
    assert_same_bits(params, plain)  # the scale is a power of 2


@each_scaler
@each_backend
@pytest.mark.parametrize("options", [STOCHASTIC, STOCHASTIC | {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
def test_a_skipped_step_leaves_no_trace(scaler_class, options, backend, device):
    """Not in a parameter, a state, an average, a count, or a random bit: as a run that never had it."""
    runs = []
    for faults in ([0.0, 0.0, 0.0], [0.0, math.inf, 0.0, math.nan, -math.inf, 0.0], [math.nan, 0.0, 0.0, 0.0]):
        params = parameters(device, BF16)
        opt = triton_optim.AdamW(params, lr=0.01, amp="fused", backend=backend, **options)
        scaler = new_scaler(scaler_class, device)
        number = 0
        for fault in faults:
            before = bits(opt)
            give(params, number, scaler.get_scale(), fault)
            scaler.step(opt)
            scaler.update()
            assert opt.skipped == (fault != 0)
            if fault == 0:
                number += 1
            elif number:
                assert_same_bits(bits(opt), before)
            else:
                assert_same_bits(bits(opt)[0], before[0])
            if number == 3:
                break
        assert [float(opt.state[p]["step"]) for p in params] == [3.0] * 3
        assert [float(opt.state[p]["n_averaged"]) for p in params] == [3.0] * 3
        runs.append(bits(opt))
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


@each_backend
def test_the_next_steps_of_who_misses_gradients_are_not_counted_either(backend, device):
    """A parameter without a gradient is averaged as it is, but not in a step that is skipped."""
    ends = []
    for faults in ([0.0, 0.0, 0.0], [0.0, math.inf, 0.0, 0.0]):
        params = parameters(device)
        opt = triton_optim.SGD(params, lr=0.1, amp="fused", ema_decay=0.5, backend=backend)
        scaler = new_scaler(triton_optim.GradScaler, device)
        number = 0
        for fault in faults:
            give(params, number, scaler.get_scale(), fault)
            if number == 1:
                params[0].grad = None
            scaler.step(opt)
            scaler.update()
            number += fault == 0
        ends.append(bits(opt))
    assert_same_bits(*ends)


@each_scaler
def test_the_scale_backs_off_and_grows_as_torchs(scaler_class, device):
    faults = [0, 0, math.inf, 0, 0, 0, math.nan, math.inf, 0, 0]
    histories, ends = [], []
    for cls, scaler_cls in ((triton_optim.SGD, scaler_class), (torch.optim.SGD, torch.amp.GradScaler)):
        params = parameters(device)
        ours = {"amp": "fused", "backend": "eager"} if cls is triton_optim.SGD else {}
        opt = cls(params, lr=0.1, **ours)
        scaler = new_scaler(scaler_cls, device, growth_interval=2, growth_factor=4.0)
        scales = []
        for k, fault in enumerate(faults):
            give(params, k, scaler.get_scale(), fault)
            scaler.step(opt)
            scaler.update()
            scales.append((scaler.get_scale(), scaler._get_growth_tracker()))
        histories.append(scales)
        ends.append(params)
    assert histories[0] == histories[1]
    torch.testing.assert_close(*ends)


@each_scaler
@each_backend
def test_gradients_that_were_unscaled_are_not_unscaled_again(scaler_class, backend, device):
    params, plain = parameters(device), parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, amp="fused", backend=backend)
    without = triton_optim.SGD(plain, lr=0.1, backend=backend)
    scaler = new_scaler(scaler_class, device)
    for k, fault in enumerate([0.0, math.inf, 0.0]):
        give(params, k, scaler.get_scale(), fault)
        scaler.unscale_(opt)
        triton_optim.clip_grad_value_(params, 0.5)
        scaler.step(opt)
        scaler.update()
        if not fault:
            give(plain, k)
            triton_optim.clip_grad_value_(plain, 0.5)
            without.step()
    assert_same_bits(params, plain)


@each_scaler
@pytest.mark.parametrize("amp", [None, "fused"])
def test_a_disabled_scaler_only_steps(scaler_class, amp, device):
    params, plain = parameters(device), parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, amp=amp, backend="eager")
    scaler = scaler_class(device.type, enabled=False)
    give(params, 0)
    give(plain, 0)
    scaler.unscale_(opt)
    assert scaler.step(opt, lambda: 5.0) == 5.0
    scaler.update()
    triton_optim.SGD(plain, lr=0.1, backend="eager").step()
    assert_same_bits(params, plain)
    assert scaler.get_scale() == 1


@each_scaler
def test_of_two_optimizers_only_the_one_with_infinities_is_skipped(scaler_class, device):
    params = [parameters(device), parameters(device)]
    opts = [triton_optim.SGD(own, lr=0.1, amp="fused", backend="eager") for own in params]
    before = bits(opts[0])
    scaler = new_scaler(scaler_class, device)
    give(params[0], 0, SCALE, math.inf)
    give(params[1], 0, SCALE)
    for opt in opts:
        scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert_same_bits(bits(opts[0]), before)
    assert not torch.equal(params[0][0], params[1][0])
    assert [float(opt.skipped) for opt in opts] == [1, 0]


@each_scaler
def test_two_steps_before_an_update_are_torchs_error(scaler_class, device):
    params = parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, amp="fused", backend="eager")
    scaler = new_scaler(scaler_class, device)
    give(params, 0, SCALE)
    scaler.step(opt)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(opt)


@each_scaler
def test_an_optimizer_without_gradients_beside_another(scaler_class, device):
    params, others = parameters(device), parameters(device)
    opts = [triton_optim.SGD(own, lr=0.1, amp="fused", backend="eager") for own in (params, others)]
    scaler = new_scaler(scaler_class, device)
    give(params, 0, SCALE)
    before = bits(opts[1])
    for opt in opts:
        scaler.step(opt)
    scaler.update()
    assert_same_bits(bits(opts[1]), before)


@each_backend
def test_without_a_scaler_a_fused_optimizer_steps_plainly(backend, device):
    """And as it takes gradients as they are, Inf is nobody's business."""
    params, plain = parameters(device), parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, amp="fused", backend=backend)
    without = triton_optim.SGD(plain, lr=0.1, backend=backend)
    scaler = new_scaler(triton_optim.GradScaler, device)
    give(params, 0, SCALE, math.inf)
    scaler.step(opt)
    assert opt.skipped == 1
    for k, fault in enumerate([0.0, math.inf]):
        for own, one in ((params, opt), (plain, without)):
            give(own, k, fault=fault)
            one.step()
    assert_same_bits(params, plain)
    assert opt.skipped is None
    assert params[1][7].isinf()


def test_a_step_that_raises_leaves_no_scale_behind(device):
    params, plain = parameters(device), parameters(device)
    opt = triton_optim.AdamW(params, lr=0.1, amp="fused", backend="eager")
    scaler = new_scaler(triton_optim.GradScaler, device)
    before = bits(opt)
    give(params, 0, SCALE)
    params[2].grad = params[2].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(opt)
    assert_same_bits(bits(opt), before)
    assert not hasattr(opt, "grad_scale")
    give(params, 0, SCALE)
    scaler.step(opt)
    give(plain, 0)
    triton_optim.AdamW(plain, lr=0.1, backend="eager").step()
    assert_same_bits(params, plain)


def test_what_the_caller_has_scaled_by_besides_is_taken_out_too(device):
    """As torch: the product of the scaler's scale and `optimizer.grad_scale`."""
    ends = []
    for scaler_class in SCALERS.values():
        params = parameters(device)
        opt = triton_optim.SGD(params, lr=0.1, amp="fused", backend="eager")
        give(params, 0, SCALE * 4)
        opt.grad_scale = torch.tensor(4.0, device=device)
        new_scaler(scaler_class, device).step(opt)
        ends.append(params)
    give(plain := parameters(device), 0)
    triton_optim.SGD(plain, lr=0.1, backend="eager").step()
    for params in ends:
        assert_same_bits(params, plain)


@each_backend
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("clip", [None, 1e9])
def test_grad_scale_and_found_inf_of_either_shape(shape, clip, backend, device):
    for found, scaled in itertools.product((None, 0.0, 1.0, 2.0), (None, SCALE)):
        params, plain = parameters(device), parameters(device)
        opt = triton_optim.SGD(params, lr=0.1, amp="fused", max_grad_norm=clip, backend=backend)
        give(params, 0, scaled or 1.0)
        if found is not None:
            opt.found_inf = torch.full(shape, found, device=device)
        if scaled is not None:
            opt.grad_scale = torch.full(shape, scaled, device=device)
        opt.step()
        if not found:
            give(plain, 0)
            triton_optim.SGD(plain, lr=0.1, backend=backend).step()
        assert_same_bits(params, plain)


# Options


@pytest.mark.parametrize("options", [{"amp": "fused", "max_grad_norm": 0.5}, {"amp": None}, {"max_grad_norm": 2.0}])
def test_copies_keep_amp_and_max_grad_norm(options, device):
    params = parameters(device)
    opt = triton_optim.SGD(params, lr=0.1, backend="eager", **options)
    give(params, 0)
    opt.step()
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    copies = []
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), torch.load(file, weights_only=False)):
        assert (other.amp, other.max_grad_norm) == (options.get("amp"), options.get("max_grad_norm"))
        assert other._step_supports_amp_scaling is (other.amp == "fused")
        copies.append(other.param_groups[0]["params"])
        give(copies[-1], 1)
        other.step()
    give(params, 1)
    opt.step()
    for own in copies:
        assert_same_bits(own, params)


def test_an_old_pickle_has_neither():
    opt = triton_optim.SGD(parameters("cpu"), lr=0.1)
    state = {name: value for name, value in opt.__getstate__().items() if name not in ("amp", "max_grad_norm")}
    other = triton_optim.SGD.__new__(triton_optim.SGD)
    other.__setstate__(state)
    assert other.amp is None
    assert other.max_grad_norm is None
    assert not other._step_supports_amp_scaling


@pytest.mark.parametrize("amp", ["yes", True, "Fused"])
def test_an_amp_that_there_is_not(amp):
    with pytest.raises(ValueError, match="amp") as error:
        triton_optim.AdamW(parameters("cpu"), amp=amp)
    explains(error, repr(amp), '"fused"')
