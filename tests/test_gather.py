"""Gradients gathered in C++: whatever happens to parameters and gradients between steps is noticed, and what is usual
takes no look of Python's.
"""

import time

import pytest
import torch
from gathering import STEPS, look_at_all, replace, reshape, run, shift_gradient, shrink
from gathering import looks as looks
from torch.nn import Parameter

from triton_optim.dispatch import this_machine
from triton_optim.util import gather

pytestmark = pytest.mark.skipif(not this_machine().cpp, reason="what gathers is built on Linux with a compiler")


def test_it_is_compiled_here():
    """Where it is not, Python looks at all gradients, and only this test tells."""
    assert gather.library.loaded is not None, gather.library.build_error


def move(opt, params):
    params[1].data = params[1].data.clone()


def turn(opt, params):
    params[5].data = params[5].data.t()  # where it was, of the same shape
    params[5].grad = params[5].grad.t()


def restride(opt, params):
    params[1].data = params[1].data.to(memory_format=torch.channels_last)


def widen(opt, params):
    for p in params:
        p.data = p.data.double()
        p.grad = p.grad.double()


def swap(opt, params):
    # What autograd holds of a parameter, and its gradient, would be swapped too.
    grad, params[2].grad = params[2].grad, None
    torch.utils.swap_tensors(params[2], Parameter(params[2].detach() * 2))
    params[2].grad = grad


def skip(opt, params):
    params[0].grad = None


def skip_all(opt, params):
    for p in params:
        p.grad = None


def transpose(opt, params):
    params[4].grad = params[4].grad.t().contiguous().t()


def cut(opt, params):
    params[2].grad.data = params[2].grad.data[:5]


def negate(opt, params):
    params[2].grad = torch._neg_view(params[2].grad)
    assert params[2].grad.is_neg()


def negate_strided(opt, params):
    params[4].grad = torch.complex(torch.zeros_like(params[4]), params[4].grad).conj().imag
    assert params[4].grad.is_neg()


def narrow(opt, params):
    for p in params:
        g, p.grad = p.grad, None
        p.grad_dtype = torch.bfloat16
        p.grad = g.bfloat16()


def make_sparse(opt, params):
    params[4].grad = params[4].grad.to_sparse()


def expand(opt, params):
    params[4].grad = torch.ones((), device=params[4].device).expand(5, 2)


def load_states(opt, params):
    opt.load_state_dict(opt.state_dict())


def replace_state(opt, params):
    opt.state[params[1]]["exp_avg"] = torch.ones_like(params[1])


def add_group(opt, params):
    params.append(Parameter(torch.ones(3, device=params[0].device)))
    params[-1].grad = torch.ones_like(params[-1])
    opt.add_param_group({"params": [params[-1]], "lr": 0.5})


def change_rate(opt, params):
    opt.param_groups[0]["lr"] = 0.5


def change_betas(opt, params):
    opt.param_groups[0]["betas"] = (0.5, 0.6)


def rate_in_a_tensor(opt, params):
    opt.param_groups[0]["lr"] = torch.tensor(0.5)


def maximize(opt, params):
    opt.param_groups[0]["maximize"] = True


def limit(opt, params):
    opt.max_grad_norm = 0.01


def reverse(opt, params):
    opt.param_groups[0]["params"].reverse()


def drop(opt, params):
    opt.param_groups[0]["params"].pop(1)


def trade_names(opt, params):
    group = opt.param_groups[0]
    group["lr"], group["eps"] = group["eps"], group["lr"]


def other_order(opt, params):
    """The same values, of which the rate has come last."""
    group = opt.param_groups[0]
    group["lr"] = group.pop("lr")


def share_parameter(opt, params):
    params[0].data.share_memory_()  # other memory for the same storage


def share_states(opt, params):
    for value in opt.state[params[0]].values():
        if value.dim():
            value.share_memory_()


DISTURBANCES = [share_parameter, share_states, move, reshape, shrink, turn, restride, widen, swap, replace, skip,
                skip_all, transpose, cut, negate, negate_strided, narrow, make_sparse, expand, load_states,
                replace_state, add_group, shift_gradient, change_rate, change_betas, rate_in_a_tensor, maximize, limit,
                reverse, drop, trade_names, other_order]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda d: d.__name__)
def test_what_happens_between_steps_is_noticed(disturb, backend, device, looks, monkeypatch):
    if backend == "cpp" and device.type != "cpu":
        pytest.skip("the C++ backend needs CPU tensors; a GPU is tested here")
    before = []
    gathered = run(disturb, backend, device, mark=lambda: before.append(list(looks)))
    # Python has looked at the first step's, to plan it, and at none after it.
    assert before == [[True]]
    look_at_all(monkeypatch)
    looked_at = run(disturb, backend, device)
    assert len(gathered) == len(looked_at)
    for ours, theirs in zip(gathered, looked_at, strict=True):
        assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)


@pytest.mark.parametrize("disturb", [None, change_rate], ids=["nothing", "rate"])
def test_usual_steps_take_no_look(disturb, device, looks):
    run(disturb or (lambda opt, params: None), "auto", device)
    assert looks == [True]


def test_python_looks_where_the_tests_say_so(device, looks, monkeypatch):
    look_at_all(monkeypatch)
    run(lambda opt, params: time.sleep(0.1), "auto", device)  # in which a thread could load what gathers
    assert len(looks) == STEPS


def test_what_is_on_disk_is_there_from_the_first_step_on(monkeypatch):
    found = gather.Library()
    found.load_built()
    assert found.loaded is not None
    monkeypatch.setattr(gather, "flags", lambda: ("--of-another-compiler",))
    other = gather.Library()
    other.load_built()
    assert other.loaded is None
    assert other.build_error is None  # nothing was tried
