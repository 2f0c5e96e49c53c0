"""Ours and torch's optimizer side by side: equal parameters, equal gradients, equal ends."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from triton_optim.kernels.language import PRIMITIVES, torch_form

# Of torch's constructors: how it runs, not what. Not all of them take each.
HOW = ("foreach", "fused", "capturable", "differentiable")


def ours(case, params, backend="eager", **options):
    return case.ours(params, **(case.settings | options), backend=backend)


def peer(case, params, **options):
    options = {name: value for name, value in options.items() if name not in HOW or case.peer_takes(name)}
    return case.peer(params, **(case.settings | options))


def torchs(case):
    """Whose errors ours are compared with."""
    return case.torchs or torch.optim.AdamW


def leaf():
    return [Parameter(torch.ones(3))]


def side_by_side(case, backend, device, **options):
    """Parameters and optimizer of ours, then of torch's."""
    params, theirs = case.parameters(device), case.parameters(device)
    return params, ours(case, params, backend, **options), theirs, peer(case, theirs, **options)


def give_grads(case, step, *models, missing=()):
    """Each list of parameters gets the same gradients, in tensors of its own that are new at each step."""
    for params in models:
        random = torch.Generator().manual_seed(1000 + step)
        for i, p in enumerate(params):
            g = case.gradient(p, random)
            p.grad = None if i in missing else g


def train(case, steps, *pairs):
    for step in steps:
        give_grads(case, step, *(params for params, _ in pairs))
        for _, opt in pairs:
            opt.step()


def assert_same(case, opt, theirs, **tolerance):
    """Equal parameters and states; the same state keys; equal step counts, exactly."""
    tolerance = tolerance or case.close
    for group, their_group in zip(opt.param_groups, theirs.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], their_group["params"], strict=True)):
            torch.testing.assert_close(p, q, **tolerance, msg=lambda m, i=i: f"parameter {i}: {m}")
            state, their_state = opt.state.get(p, {}), theirs.state.get(q, {})
            assert set(state) == set(their_state), f"state keys of parameter {i}"
            for key, value in their_state.items():
                exactly = {"rtol": 0, "atol": 0} if key == "step" else tolerance
                torch.testing.assert_close(
                    state[key], value, **exactly, msg=lambda m, i=i, key=key: f"{key} of {i}: {m}"
                )


def assert_equal(tensors, expected):
    torch.testing.assert_close(list(tensors), list(expected), rtol=0, atol=0)


def values(params):
    return [p.detach().clone() for p in params]


def state_of(opt):
    """A copy, by parameter."""
    return copy.deepcopy(opt.state_dict()["state"])


def alive(references):
    if any(reference() is not None for reference in references):
        gc.collect()  # a quarter of a second, so only where counting references has not done it
    return [i for i, reference in enumerate(references) if reference() is not None]


@contextmanager
def nearest_roots() -> Iterator[None]:
    """Eager steps with roots that are the nearest numbers. torch's own are MKL's, of which on some processors every
    fifth is not.
    """
    in_triton, _, in_cpp = PRIMITIVES["sqrt"]

    def nearest_root(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(np.sqrt(x.cpu().numpy()))).to(x.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRIMITIVES, "sqrt", (in_triton, nearest_root, in_cpp))
        torch_form.cache_clear()
        yield
    torch_form.cache_clear()


def backward(case, loss, params):
    """``loss.backward()``; for who takes sparse gradients, they are made sparse."""
    loss.backward()
    if case.sparse:
        for p in params:
            p.grad = None if p.grad is None else p.grad.to_sparse(1)
