"""Memory that moves, shrinks or is turned between steps, at the same address or at another."""

import pytest
import torch
from one_step import step_with
from sharding import values
from torch.nn import Parameter

import triton_optim as to

# What must be noticed is noticed by C++, where gradients are gathered, and by Python.
BOTH_WAYS = pytest.mark.usefixtures("gradients_are")


def sgd(params, backend):
    return to.SGD(params, lr=1.0, momentum=0.5, backend=backend)


@BOTH_WAYS
def test_data_replaced_by_its_transpose(backend, device):
    """The same address and the same shape."""
    p = Parameter(torch.zeros(2, 2, device=device))
    opt = sgd([p], backend)
    step_with(opt, [p], [torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)])
    p.data = p.data.t()
    step_with(opt, [p], [torch.tensor([[0.0, 8.0], [0.0, 0.0]], device=device)])
    # -[[1, 3], [2, 4]], less the new gradient plus half the old one, which the buffer holds for the old places.
    assert p.tolist() == [[-1.5, -12.0], [-3.5, -6.0]]


@BOTH_WAYS
def test_same_address_other_size(backend, device):
    base = torch.zeros(4, device=device)
    p = Parameter(base)
    opt = to.SGD([p], lr=1.0, backend=backend)
    step_with(opt, [p], [torch.ones(4, device=device)])
    p.grad = None
    p.data = base[:2]
    step_with(opt, [p], [torch.ones(2, device=device)])
    assert base.tolist() == [-2, -2, -1, -1]
    assert p.data_ptr() == base.data_ptr()
    p.grad = None
    p.data = base.view(2, 2)
    step_with(opt, [p], [torch.ones(2, 2, device=device)])
    assert base.tolist() == [-3, -3, -2, -2]


@BOTH_WAYS
def test_gradient_left_from_another_size_is_refused(backend, device):
    base = torch.zeros(4, device=device)
    p = Parameter(base)
    opt = to.SGD([p], lr=1.0, backend=backend)
    step_with(opt, [p], [torch.zeros(4, device=device)])
    p.grad.fill_(1)
    p.data = base[:2]
    assert p.grad.shape == (4,)
    with pytest.raises(RuntimeError, match="shape"):
        opt.step()
    assert not base.any()


@BOTH_WAYS
def test_same_address_other_dtype(backend, device):
    """1.0 in float16 is 0.0078125 in bfloat16."""
    p = Parameter(torch.ones(4, dtype=torch.float16, device=device))
    opt = to.SGD([p], lr=1.0, backend=backend)
    step_with(opt, [p], [torch.zeros_like(p)])
    p.grad = None
    p.data = p.data.view(torch.bfloat16)
    step_with(opt, [p], [torch.full_like(p, 0.00390625)])
    assert p.dtype == torch.bfloat16
    assert p.tolist() == [0.00390625] * 4


@BOTH_WAYS
def test_storage_freed_and_made_anew(backend, device):
    """As training does that frees parameters between their uses."""
    p = Parameter(torch.zeros(1000, device=device))
    opt = sgd([p], backend)
    step_with(opt, [p], [torch.ones(1000, device=device)])
    size = p.untyped_storage().nbytes()
    p.untyped_storage().resize_(0)
    others = [torch.full((1000,), 5.0, device=device) for _ in range(8)]  # one of them may lie where p did
    p.untyped_storage().resize_(size)
    p.data.fill_(3)
    step_with(opt, [p], [torch.ones(1000, device=device)])
    assert p.tolist() == [1.5] * 1000
    assert all((other == 5).all() for other in others)


@BOTH_WAYS
def test_gradient_at_the_same_address_in_another_layout(backend, device):
    p, buffer = Parameter(torch.zeros(2, 2, device=device)), torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    opt = to.SGD([p], lr=1.0, backend=backend)
    for view in (buffer, buffer, buffer.t(), torch._neg_view(buffer), buffer):
        step_with(opt, [p], [view])
    assert p.tolist() == [[-3, -7], [-8, -12]]


@BOTH_WAYS
def test_gradients_freed_and_others_at_their_addresses(backend, device):
    """Each step's gradients are freed before the next ones are made, of another size and order."""
    params = [Parameter(torch.zeros(n, device=device)) for n in (100, 200, 100, 200)]
    opt = to.SGD(params, lr=1.0, backend=backend)
    total = [0.0] * 4
    for k in range(6):
        given = [None] * 4
        for i in (range(4), range(3, -1, -1), (2, 0))[k % 3]:
            given[i] = torch.full_like(params[i], float(k + 10 * i)).detach()
            total[i] += k + 10 * i
        step_with(opt, params, given)
        del given
        opt.zero_grad()
    for p, expected in zip(params, total, strict=True):
        assert (p == -expected).all()


@pytest.mark.parametrize("place", [0, 2], ids=["first", "last"])  # what moves one state moves these too
@BOTH_WAYS
def test_data_of_a_state_replaced(place, backend, device):
    """As code does that keeps states on another device between steps. The old memory must not be written."""
    params = [Parameter(torch.zeros(4, device=device)) for _ in range(3)]
    opt = sgd(params, backend)
    ones = [torch.ones(4, device=device) for _ in params]
    step_with(opt, params, ones)
    state = opt.state[params[place]]["momentum_buffer"]
    old = state.data
    before = old.clone()
    state.data = torch.full((4,), 10.0, device=device)
    step_with(opt, params, ones)
    assert opt.state[params[place]]["momentum_buffer"].tolist() == [6.0] * 4
    assert [p[0].item() for p in params] == [-7.0 if i == place else -2.5 for i in range(3)]
    assert torch.equal(old, before)


@BOTH_WAYS
def test_state_replaced_by_its_transpose(backend, device):
    """The same address and the same shape."""
    p = Parameter(torch.zeros(2, 2, device=device))
    opt = sgd([p], backend)
    step_with(opt, [p], [torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)])
    opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].t()
    step_with(opt, [p], [torch.zeros(2, 2, device=device)])
    assert p.tolist() == [[-1.5, -3.5], [-4.0, -6.0]]


@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed:UserWarning")  # Inductor's, when it compiles
@BOTH_WAYS
def test_state_replaced_at_the_same_address_in_another_dtype(backend, device):
    p = Parameter(torch.zeros(4, dtype=torch.float16, device=device))
    opt = sgd([p], backend)
    step_with(opt, [p], [torch.ones_like(p)])
    p.data.zero_()
    opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].view(torch.bfloat16)  # now 0.0078125
    step_with(opt, [p], [torch.zeros_like(p)])
    assert opt.state[p]["momentum_buffer"].dtype == torch.bfloat16
    assert p.tolist() == [-0.00390625] * 4


# Trap 4: views at odd offsets.


def test_parameters_and_gradients_sliced_from_flat_buffers(backend, device):
    """As sharded training keeps them. They move as the buffer would as a whole; the padding between is left alone."""
    sizes = [5, 1, 16, 7, 33, 4]
    spans = [(sum(sizes[:i]) + i, n) for i, n in enumerate(sizes)]  # one element of padding after each
    length = sum(sizes) + len(sizes)
    start, gradients = values(length, 0, device), [values(length, 1, device), values(length, 2, device)]
    flat, whole = start.clone(), Parameter(start.clone())
    params = [Parameter(flat[a : a + n]) for a, n in spans]
    opt, other = to.AdamW(params, lr=0.1, backend=backend), to.AdamW([whole], lr=0.1, backend=backend)
    for g in gradients:
        step_with(opt, params, [g[a : a + n] for a, n in spans])
        step_with(other, [whole], [g])
    padding = [a + n for a, n in spans]
    assert torch.equal(flat[padding], start[padding]), "padding was written to"
    inside = [i for a, n in spans for i in range(a, a + n)]
    torch.testing.assert_close(flat[inside], whole.detach()[inside], rtol=1e-6, atol=1e-7)
    assert sum(bucket.tensors for bucket in to.explain(opt)) == len(sizes)
