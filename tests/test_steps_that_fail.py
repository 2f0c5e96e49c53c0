"""A step that fails changes nothing, wherever in it the fault is."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from one_step import step_with
from sharding import values
from torch.nn import Parameter

import triton_optim as to
from triton_optim.kernels.language import jit
from triton_optim.spec import State

# Trap 9: check all before the first write.


class Rate(NamedTuple):
    lr: float


@jit
def accumulate(p, g, total, h):
    return p - h.lr * g, total + g


class Accumulate(to.RuleOptimizer):
    rule = accumulate
    states = (State("total"),)

    def __init__(self, params, lr=1.0, faulty=None, backend="auto"):
        super().__init__(params, {"lr": lr, "faulty": faulty}, backend=backend)

    def scalars(self, group, step):
        return group["faulty"]() if group["faulty"] else Rate(group["lr"])


def two_buckets(cls, backend, device, started):
    """Parameters of two dtypes in each of two groups; the last one stands in the bucket that runs last."""
    params = [Parameter(values(3, i, device, dtype)) for i, dtype in enumerate([torch.float32, torch.float64] * 2)]
    opt = cls([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
    if started:
        step_with(opt, params, [torch.ones_like(p) for p in params])
    return opt, params


def content(opt, params):
    """Bits of parameters and states. A state of nothing but zeros is as good as none."""
    states = [{k: v.detach().clone() for k, v in opt.state.get(p, {}).items() if v.any()} for p in params]
    return [p.detach().clone() for p in params], states


def assert_failed_and_changed_nothing(opt, params):
    """The step raises; afterwards all is as before, for this optimizer and for whoever loads its state."""
    (before, states), error = content(opt, params), None
    try:
        opt.step()
    except Exception as raised:
        error = raised
    assert error is not None, "the step went through"
    after, states_after = content(opt, params)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new), f"half applied: parameter {i} was written"
    for i, (old, new) in enumerate(zip(states, states_after, strict=True)):
        assert old.keys() == new.keys(), f"half applied: states {old.keys() ^ new.keys()} of parameter {i}"
        assert all(torch.equal(old[key], new[key]) for key in old), f"half applied: a state of parameter {i}"


FAULTS = {
    "raises": lambda: 1 / 0,
    "no NamedTuple": lambda: 0.5,
    "no number in it": lambda: Rate(None),
    "text in it": lambda: Rate("0.5"),
    "another NamedTuple": lambda: NamedTuple("Other", [("rate", float)])(1.0),
}


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_scalars_of_the_last_group_are_wrong(fault, started, backend, device):
    opt, params = two_buckets(Accumulate, backend, device, started)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.param_groups[1]["faulty"] = FAULTS[fault]
    assert_failed_and_changed_nothing(opt, params)
    opt.param_groups[1]["faulty"] = None  # and on it goes
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(torch.equal(p, old - 1) for p, old in zip(params, before, strict=True))
    assert {opt.state[p]["step"].item() for p in params} == {1.0 + started}
    assert {opt.state[p]["total"][0].item() for p in params} == {1.0 + started}


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
@pytest.mark.parametrize("bad", ["shape", "sparse", "complex", "state"])
def test_bad_gradient_or_state_last_in_the_list(bad, started, backend, device):
    opt, params = two_buckets(to.AdamW, backend, device, started)
    for p in params:
        p.grad = torch.ones_like(p)
    last = params[-1]
    if bad == "shape":
        last.grad, data = None, last.data
        last.data = data.new_zeros(4)  # torch checks the shape when the gradient is assigned
        last.grad = data.new_ones(4)
        last.data = data
    elif bad == "sparse":
        last.grad = torch.ones_like(last).to_sparse()
    elif bad == "complex":
        if not hasattr(last, "grad_dtype"):
            pytest.skip("this torch refuses the assignment")
        last.grad_dtype = None
        last.grad = torch.ones_like(last, dtype=torch.complex128)
    else:
        opt.state[last].update(exp_avg=torch.zeros(5, dtype=last.dtype, device=device))
    assert_failed_and_changed_nothing(opt, params)


def test_first_step_after_a_failed_one_is_still_the_first(backend, device):
    """SGD's momentum starts with the whole gradient, later ones are damped: a failed step must not count as one."""
    p, q = (Parameter(torch.zeros(3, device=device)) for _ in range(2))
    opt = to.SGD([{"params": [p]}, {"params": [q]}], lr=1.0, momentum=0.5, dampening=0.75, backend=backend)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.param_groups[1]["lr"] = None
    with contextlib.suppress(Exception):
        opt.step()
    opt.param_groups[1]["lr"] = 1.0
    opt.load_state_dict(opt.state_dict())  # whatever the failed step left goes through a checkpoint
    opt.step()
    assert (p.tolist(), q.tolist()) == ([-1.0] * 3, [-1.0] * 3)
