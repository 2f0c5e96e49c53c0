"""Addresses that are aligned or not, views with gaps, and parameters that share memory."""

import functools

import pytest
import torch
from laid_out import ELEMENTWISE, LR, OUTSIDE, assert_is_reference, in_buffer, optimizer, random_values
from one_step import step_with
from table import rows
from torch.nn import Parameter

import triton_optim as to
from triton_optim.util.layout import all_aligned

pytestmark = pytest.mark.usefixtures("two_slots")


# Alignment.


@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, 1), (torch.float32, 2), (torch.float64, 1), (torch.bfloat16, 1), (torch.bfloat16, 4)],
    ids=str,
)
def test_misaligned_view(what, dtype, offset, backend, device):
    """Its own bucket on Triton, and the memory around it is left alone."""
    values = [random_values((37,), i, device).to(dtype) for i in range(6)]
    p, q = (
        Parameter(values[0].clone()),
        Parameter(in_buffer(values[1], offset) if what == "parameter" else values[1].clone()),
    )
    opt = optimizer("AdamW", [p, q], backend)
    opt.state[q]["exp_avg"] = in_buffer(torch.zeros_like(values[0]), offset if what == "state" else 0)
    gradients = [values[2:4], values[4:6]]
    for a, b in gradients:
        step_with(opt, [p, q], [a.clone(), in_buffer(b, offset) if what == "gradient" else b.clone()])
    assert_is_reference("AdamW", opt, [p, q], values[:2], gradients)
    for t in (q, q.grad, opt.state[q]["exp_avg"]):
        around = t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        start = t.storage_offset()
        outside = torch.cat((around[:start], around[start + t.numel() :]))
        assert (outside == OUTSIDE).all(), "written outside"
    if backend == "triton":
        assert [(bucket.tensors, bucket.launches) for bucket in to.explain(opt)] == [(1, 1), (1, 1)]


def test_one_launch_and_two_with_a_misaligned_tensor(device, launches):
    shapes = [(5, 3), (7,), (2, 2, 2), ()]
    for misaligned, wanted in [(0, [True]), (1, [True, False])]:
        params = [Parameter(random_values(shape, i, device)) for i, shape in enumerate(shapes)]
        params += [Parameter(in_buffer(random_values((9,), 9, device), 1)) for _ in range(misaligned)]
        opt = to.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], backend="triton")
        for _ in range(2):
            launches.clear()
            step_with(opt, params, [random_values(p.shape, 20, device) for p in params])
            assert [constants["ALIGNED"] for _, _, constants in launches] == wanted
        assert sum(bucket.launches for bucket in to.explain(opt)) == len(wanted)


@pytest.mark.parametrize("last", [16, 24, 8, 4, 1])
def test_alignment_is_a_multiple_of_16_bytes(last):
    assert all_aligned([32, 4096, last]) == (last == 16)
    assert all_aligned([last, 4096]) == (last == 16)


def test_alignment_is_never_claimed_for_a_misaligned_address(device, launches):
    """Gradients move into and out of alignment; 37 float32 fill no multiple of 16 bytes, so neighbours in a flat
    buffer, as sharded training makes them, are misaligned too.
    """
    params = [Parameter(random_values((37,), i, device)) for i in range(3)]
    starts = [p.detach().clone() for p in params]
    opt = optimizer("AdamW", params, "triton")
    gradients = []
    for k, offsets in enumerate([(0, 0, 0), (0, 1, 0), (2, 0, 3), (0, 0, 0)]):
        gradients.append([random_values((37,), 10 * k + i, device) for i in range(3)])
        step_with(opt, params, [in_buffer(g, offset) for g, offset in zip(gradients[-1], offsets, strict=True)])
    assert_is_reference("AdamW", opt, params, starts, gradients)
    assert any(not constants["ALIGNED"] for _, _, constants in launches)
    for _, (_, tensors, addresses, *_), constants in launches:
        if constants["ALIGNED"]:
            assert not (tensors[:, 2:] % 16).any()
            assert not (addresses % 16).any()


# Memory that is not one dense stretch, or that two parameters share.

GAPPY = {
    "every other": lambda t: t[::2],
    "columns": lambda t: t[:, 1:3],
    "column": lambda t: t[:, 1],
    "transposed columns": lambda t: t[:, :3].t(),
    "window": lambda t: t[1:4, 1:4],
}


@pytest.mark.parametrize("view", list(GAPPY))
@rows(*ELEMENTWISE)
def test_parameter_with_gaps_runs_eagerly(case, view, device):
    """torch's fused CPU optimizer writes over the gaps, so the reference is the judge."""
    base = random_values((6, 5), 0, device)
    p, other = Parameter(GAPPY[view](base)), Parameter(random_values((3,), 1, device))
    start, before = [p.detach().clone(), other.detach().clone()], base.clone()
    gradients = [[random_values(t.shape, 2 + i, device) for t in start] for i in range(3)]
    opt = optimizer(case.name, [p, other], "auto")
    for row in gradients:
        step_with(opt, [p, other], row)
    assert_is_reference(case.name, opt, [p, other], start, gradients)
    inside = GAPPY[view](torch.arange(30).view(6, 5)).reshape(-1)
    outside = [i for i in range(30) if i not in inside.tolist()]
    assert torch.equal(base.view(-1)[outside], before.view(-1)[outside]), "a gap was written to"
    assert {bucket.reason: bucket.backend for bucket in to.explain(opt)}["the parameter is a view with gaps"] == "eager"


@pytest.mark.parametrize("pinned", ["compiled", "cpp", "triton"])
def test_parameter_with_gaps_is_refused_by_a_pinned_backend(pinned, device):
    with pytest.raises(RuntimeError, match="gaps"):
        to.AdamW([random_values((6, 5), 0, device)[:, 1:3].requires_grad_()], backend=pinned)


SHARED = {
    "whole": lambda base: (base[:], base[:]),
    "part": lambda base: (base[:4], base[2:]),
    "inner": lambda base: (base[:], base[2:3]),
    "interleaved": lambda base: (base[::2], base[1::2]),
    "neighbours": lambda base: (base[:3], base[3:]),
}


@pytest.mark.parametrize("sharing", list(SHARED))
def test_parameters_that_share_storage_are_updated_in_turn(sharing, device):
    """The second one sees what the first has written, as in torch's for-loop."""
    bases = [random_values((6,), 0, device) for _ in range(2)]
    ours, theirs = ([Parameter(view) for view in SHARED[sharing](base)] for base in bases)
    opt = to.AdamW(ours, lr=LR)
    their_opt = torch.optim.AdamW(theirs, lr=LR, foreach=False)
    for i in range(3):
        for own in zip(ours, theirs, strict=True):
            for p in own:
                p.grad = random_values(p.shape, 5 + i, device)
        opt.step()
        their_opt.step()
    torch.testing.assert_close(bases[0], bases[1], rtol=1e-6, atol=1e-6)  # float32 against float32, 3 steps
    overlap = sharing not in ("interleaved", "neighbours")
    assert not overlap or {bucket.backend for bucket in to.explain(opt)} == {"eager"}
    assert sharing != "neighbours" or {bucket.backend for bucket in to.explain(opt)} != {"eager"}


@pytest.mark.parametrize("pinned", ["compiled", "cpp", "triton"])
def test_sharing_parameters_are_refused_by_a_pinned_backend_and_nothing_changes(pinned, device):
    base = random_values((6,), 0, device)
    before = base.clone()
    x, y, z = Parameter(random_values((2,), 1, device)), Parameter(base[:4]), Parameter(base[2:])
    with pytest.raises(RuntimeError, match="overlap"):  # when it is made, or at the latest here
        step_with(to.AdamW([x, y, z], backend=pinned), [x, y, z], [torch.ones_like(t) for t in (x, y, z)])
    assert torch.equal(base, before)
    assert torch.equal(x, random_values((2,), 1, device))


@pytest.mark.parametrize("choice", ["auto", "eager", "compiled", "cpp", "triton"])
def test_expanded_parameter_is_refused_and_nothing_changes(choice, device):
    """As by torch: what its one stored value should become is undefined. It stands last: all is checked first."""
    first, expanded = Parameter(random_values((2,), 1, device)), Parameter(random_values((1,), 0, device).expand(3))
    with pytest.raises(RuntimeError):  # when it is made, or at the latest here
        step_with(
            to.AdamW([first, expanded], backend=choice),
            [first, expanded],
            [torch.ones_like(t) for t in (first, expanded)],
        )
    assert torch.equal(first, random_values((2,), 1, device)), "half applied"
    assert torch.equal(expanded[0], random_values((1,), 0, device)[0])


@pytest.mark.parametrize("which", ["eager", "auto"])
def test_shared_memory_is_updated_in_the_order_of_the_parameters(device, which):
    """The second and the third share it. Gradients of two dtypes are in two buckets, the first of the third's."""
    ends = []
    for make in (torch.optim.Adagrad, functools.partial(to.Adagrad, backend=which)):
        params = [Parameter(torch.arange(1.0, 5.0, device=device) + i) for i in range(3)]
        params[2].data = params[1].data
        optimizer = make(params, lr=0.1, weight_decay=0.5)
        for k in range(3):
            for p, sign, dtype in zip(params, (1, -1, 1), (torch.float64, torch.float32, torch.float64), strict=True):
                p.grad = None
                p.grad_dtype = dtype
                p.grad = sign * (k + 1) * torch.arange(1.0, 5.0, dtype=dtype, device=device)
            optimizer.step()
        ends.append(params[1].detach().clone())
    torch.testing.assert_close(*ends)


def test_overlapping_windows_run_eagerly(device):
    """Rows (0, 1), (1, 2), (2, 3) of one buffer: what is in one row alone is exact, and nothing else is touched."""
    base = torch.arange(6.0, device=device)
    p = Parameter(base.as_strided((3, 2), (1, 1), 1))
    opt = to.SGD([p], lr=0.5)
    step_with(opt, [p], [torch.ones(3, 2, device=device)])
    assert [bucket.backend for bucket in to.explain(opt)] == ["eager"]
    assert base[[0, 1, 4, 5]].tolist() == [0.0, 0.5, 3.5, 5.0]
