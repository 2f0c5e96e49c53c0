"""Parameters whose gradients are gathered by C++, and the steps for which Python looked at them."""

import pytest
import torch
from torch.nn import Parameter

import triton_optim as to
from triton_optim.engine.plan import Plan
from triton_optim.util import gather

SHAPES = [(3, 2, 1, 1), (4, 2, 3, 3), (7,), (), (5, 2), (3, 3)]
STEPS = 6
DISTURBED = 3  # the step before which something happens


def made(device):
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=random).to(device)) for shape in SHAPES]


def give_gradients(params, step):
    random = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(p.device, getattr(p, "grad_dtype", None) or p.dtype)


@pytest.fixture
def looks(monkeypatch):
    """The steps for which Python looked at the gradients: True where they could be used."""
    found, bind = [], Plan.bind
    monkeypatch.setattr(Plan, "bind", lambda self, g: found.append(bind(self, g)) or found[-1])
    return found


def look_at_all(patch):
    """From now on Python looks at all gradients: nothing gathers them, and nothing that would is loaded."""
    patch.setattr(gather.library, "loaded", None)
    patch.setattr(gather.library, "start_build", lambda: None)  # done in another thread after the second step


def reshape(opt, params):
    params[4].data = params[4].data.view(2, 5)  # where it was
    params[4].grad = params[4].grad.view(2, 5)


def shrink(opt, params):
    params[2].whole = params[2].data
    params[2].data = params[2].data[:5]  # where it was, with the stride it had
    params[2].grad = params[2].grad[:5]


def replace(opt, params):
    new = Parameter(params[2].detach() + 1)
    new.grad = params[2].grad
    params[2] = opt.param_groups[0]["params"][2] = new


def shift_gradient(opt, params):
    params[2].grad = torch.cat((params[2].grad[:1], params[2].grad))[1:]  # at no multiple of 16


def run(disturb, backend, device, mark=lambda: None):
    params = made(device)
    # A state keeps its shape, and would not be that of a parameter that is reshaped; without one, none tells of others.
    kind = to.SGD if disturb in (reshape, shrink, replace) else to.AdamW
    opt = kind(params, lr=0.1, backend=backend)
    for step in range(STEPS):
        give_gradients(params, step)
        if step == DISTURBED:
            mark()
            try:
                disturb(opt, params)
            except RuntimeError as error:
                pytest.skip(f"torch does not do it: {error}")
        try:
            opt.step()
        except RuntimeError as error:  # of a kind that is refused
            return [str(error), *(p.detach() for p in params)]
    return [t.detach() for p in params for t in (p, getattr(p, "whole", p), *opt.state.get(p, {}).values())]
