"""The averages of the weights in the place of the weights, for a while."""

import copy
import gc

import pytest
import torch
from averaging import BF16, averaged, bits, give, model, small, train
from compared import assert_same_bits
from complaints import explains
from torch import Tensor

import triton_optim as to


@pytest.mark.parametrize("precision", ["storage", "stochastic", "kahan", "split24", "split32", "master"])
def test_the_weights_and_what_rounding_left_of_them_come_back(precision, device):
    params, opt = small(device, dtype=BF16, param_precision=precision, state_dtype=torch.float32)
    before = bits(opt)
    versions = [p.data_ptr() for p in params]
    with opt.averaged_parameters():
        for p in params:
            assert_same_bits(p.detach(), opt.state[p]["ema"].to(BF16))
            assert not torch.equal(p, before[0][0])
    assert_same_bits(bits(opt), before)
    assert [p.data_ptr() for p in params] == versions
    other, undisturbed = small(device, dtype=BF16, param_precision=precision, state_dtype=torch.float32)
    train(params, opt, [7])
    train(other, undisturbed, [7])
    assert_same_bits(bits(opt), bits(undisturbed))


def test_an_exception_inside_brings_the_weights_back(device):
    _, opt = small(device)
    before = bits(opt)
    with pytest.raises(KeyError), opt.averaged_parameters():
        raise KeyError
    assert_same_bits(bits(opt), before)
    averaged(opt)


def test_averaged_parameters_within_itself(device):
    _, opt = small(device)
    before = bits(opt)
    with opt.averaged_parameters():
        inside = bits(opt)
        with pytest.raises(RuntimeError, match="entered already") as error, opt.averaged_parameters():
            pass
        assert_same_bits(bits(opt), inside)
    explains(error, "averaged_parameters()", "leave it first")
    assert_same_bits(bits(opt), before)


def test_a_step_within_averaged_parameters(backend, device):
    params, opt = small(device, backend)
    before = bits(opt)
    with opt.averaged_parameters():
        inside = bits(opt)
        give(params, 7)
        with pytest.raises(RuntimeError, match="step inside") as error:
            opt.step()
        assert_same_bits(bits(opt), inside)
    explains(error, "averaged_parameters()", "Leave it first")
    assert_same_bits(bits(opt), before)
    opt.step()


@pytest.mark.parametrize(
    "what",
    [
        lambda model, opt, saved: opt.state_dict(),
        lambda model, opt, saved: opt.load_state_dict(saved),
        lambda model, opt, saved: copy.deepcopy(opt),
        lambda model, opt, saved: to.to_torch_state_dict(opt),
        lambda model, opt, saved: to.load_torch_state_dict(opt, saved),
        lambda model, opt, saved: to.master_state_dict(model, opt),
        lambda model, opt, saved: to.load_master_state_dict(model, opt, model.state_dict()),
    ],
    ids=["state_dict", "load", "deepcopy", "to torch", "from torch", "masters", "load masters"],
)
def test_no_checkpoint_within_averaged_parameters(what, device):
    """It would go on from the averages, with the states of the weights."""
    params, opt = small(device)
    saved, before = copy.deepcopy(opt.state_dict()), bits(opt)
    with opt.averaged_parameters():
        inside = bits(opt)
        with pytest.raises(RuntimeError, match="inside averaged_parameters") as error:
            what(params, opt, saved)
        assert_same_bits(bits(opt), inside)
    explains(error, "averages", "Leave it first")
    assert_same_bits(bits(opt), before)
    what(params, opt, saved)


def test_averaged_parameters_of_who_keeps_none(device):
    _, opt = small(device, ema_decay=None)
    with pytest.raises(RuntimeError, match="keeps no averages") as error, opt.averaged_parameters():
        pass
    explains(error, "AdamW", "ema_decay=")


def test_before_the_first_step_the_parameters_stay_as_they_are(device):
    params = model(device)
    opt = to.AdamW(params, ema_decay=0.9)
    assert_same_bits(averaged(opt), [p.detach() for p in params])


@pytest.mark.parametrize("cls", [to.AdamW, to.Adagrad])
def test_an_average_of_no_steps_is_not_taken(cls, device):
    """Adagrad's states are there from the start, when the weights are not loaded yet."""
    params = model(device)
    opt = cls(params, ema_decay=0.9)
    loaded = [p.detach() + 1 for p in params]
    with torch.no_grad():
        for p, value in zip(params, loaded, strict=True):
            p.copy_(value)
    assert_same_bits(averaged(opt), loaded)


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_no_tensor_stays_alive_afterwards(device):
    _, opt = small(device)
    before = tensors()
    with opt.averaged_parameters():
        inside = tensors()
    assert inside > before
    assert tensors() == before
    try:
        with opt.averaged_parameters():
            raise KeyError
    except KeyError:
        pass
    assert tensors() == before


def test_autograd_notices_the_exchange(device):
    """A graph that saved the weights must not go back through others."""
    params, opt = small(device)
    loss = params[0].square().sum()
    with opt.averaged_parameters(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
