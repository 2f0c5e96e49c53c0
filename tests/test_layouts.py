"""However parameters, gradients and states lie in memory, and whatever their dtypes, the update is the same.

An update is elementwise, so on a CPU the layout may not change a single bit (`assert_same`). Against the float64
reference it may be off by the rounding of what is stored and of the arithmetic (`assert_is_reference`).
"""

import itertools

import pytest
import torch
from conftest import BACKENDS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from launches import watch_launches
from table import CASES, KINDS, NUMBERS, rows, rows_and_backends
from torch.nn import Parameter

import triton_optim as to
from triton_optim.util.layout import all_aligned

pytestmark = pytest.mark.usefixtures("two_slots")

LR = 0.1  # an element that gets another one's gradient is then off by more than any dtype rounds
# Of others, what becomes of an element depends on its row, its column or the whole matrix.
ELEMENTWISE = [case for case in KINDS if case.elementwise and not case.sparse]
BY_NAME = {case.name: case for case in CASES}
each_elementwise_and_backend = rows_and_backends(*ELEMENTWISE)
SHAPE = (2, 3, 4, 2)


OUTSIDE = 96.0  # exact in every dtype


def in_buffer(values, offset=0):
    """The same layout, `offset` elements into a buffer that is OUTSIDE everywhere else."""
    buffer = values.new_full((values.numel() + offset + 16,), OUTSIDE)
    return buffer.as_strided(values.shape, values.stride(), offset).copy_(values)


def permuted(t, *order):
    """The same values, with dimension order[0] the slowest in memory."""
    return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])


DENSE = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "reversed": lambda t: permuted(t, 3, 2, 1, 0),
    "permuted": lambda t: permuted(t, 2, 0, 3, 1),
}
# What autograd may hand over besides. All but the expanded one hold t's values.
GRADIENTS = DENSE | {
    "gappy": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0],
    "expanded": lambda t: t[:1, :, :1, :1].expand(t.shape),
    "misaligned": lambda t: in_buffer(t, 1),
    "lazily negated": lambda t: torch._neg_view(-t),
    "with a graph": lambda t: t.clone().requires_grad_() * 1,
}


def random_values(shape, seed, device):
    """Values whose sign depends on the place alone, of magnitude 0.5 to 2: then no rule's update is ill-conditioned."""
    shape = tuple(shape)
    signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))) * 2.0 - 1
    sizes = 0.5 + 1.5 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (signs * sizes).to(device)


def optimizer(name, params, backend, **settings):
    case = BY_NAME[name]
    return case.ours(params, **(case.settings | {"lr": LR} | settings), backend=backend)


def step(opt, params, gradients):
    """One step with gradients of any dtype; None for a parameter without."""
    if hasattr(torch.Tensor, "grad_dtype"):
        for p, g in zip(params, gradients, strict=True):
            if g is not None and g.dtype != p.dtype:
                p.grad_dtype = g.dtype
            p.grad = g
        opt.step()
    else:  # torch < 2.10 refuses such a gradient wherever it is assigned
        opt.engine.update(list(gradients))


def array(t):
    return t.detach().cpu().double().numpy()


def assert_same(actual, expected, what=""):
    """Equal in every bit; on a GPU, where a masked tail may be contracted to other FMAs, to within 1e-6."""
    tolerance = 1e-6 if actual.is_cuda else 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def assert_close(actual, expected, tolerance, what=""):
    torch.testing.assert_close(
        actual.detach().cpu().double(),
        torch.as_tensor(expected),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda m: f"{what}: {m}",
    )


def assert_is_reference(name, opt, params, starts, gradients, **settings):
    """Parameters and states after one step for each list of `gradients`, against the float64 reference.

    Each step may cost one rounding of the coarsest dtype that is stored and eight of the arithmetic, at values of
    order 1.
    """
    case = BY_NAME[name]
    steps = [[None if g is None else array(g) for g in row] for row in gradients]
    values, states = case.reference(
        [array(start) for start in starts], steps, **(case.settings | {"lr": LR} | settings)
    )
    for i, (p, value, state) in enumerate(zip(params, values, states, strict=True)):
        compute = torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32).eps
        stored = [p, *(opt.state[p][key] for key in state if key not in NUMBERS)]
        tolerance = len(steps) * (max(torch.finfo(t.dtype).eps for t in stored) + 8 * compute)
        assert_close(p, value, tolerance, f"parameter {i}")
        for key, expected in state.items():
            actual = opt.state[p].get(key)
            if key == "step":
                assert actual is None or actual.item() == expected, f"step of parameter {i}"
            else:
                assert_close(actual, expected, tolerance, f"{key} of parameter {i}")


@pytest.fixture
def launches(monkeypatch):
    """(programs, arguments, constants) of every launch of the Triton kernel, made as usual."""
    pytest.importorskip("triton", reason="Triton is not installed")
    seen = []

    def watch(launcher, programs, *arguments):
        kept = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        seen.append((programs, kept, launcher.constants))

    watch_launches(monkeypatch, watch)
    return seen


# Layouts of the parameter and of its gradient.


@pytest.mark.parametrize("g_layout", list(GRADIENTS))
@pytest.mark.parametrize("p_layout", list(DENSE))
def test_parameter_and_gradient_of_any_two_layouts(p_layout, g_layout, backend, device):
    start = random_values(SHAPE, 0, device)
    wanted = [random_values(SHAPE, 1 + i, device) for i in range(2)]
    if g_layout == "expanded":
        wanted = [GRADIENTS["expanded"](g).contiguous() for g in wanted]
    plain, p = Parameter(start.clone()), Parameter(DENSE[p_layout](start))
    place, strides = p.data_ptr(), p.stride()
    plain_opt, opt = (optimizer("AdamW", [q], backend) for q in (plain, p))
    for g in wanted:
        laid = GRADIENTS[g_layout](g)
        strides_of_g = laid.stride()
        step(plain_opt, [plain], [g.clone()])
        step(opt, [p], [laid])
        assert torch.equal(laid, g), "the gradient was written to"
        assert p.grad is laid
        assert laid.stride() == strides_of_g
    assert (p.data_ptr(), p.stride()) == (place, strides)
    assert_same(p, plain, "parameter")
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same(opt.state[p][key], plain_opt.state[plain][key], key)
    assert_is_reference("AdamW", opt, [p], [start], [[g] for g in wanted])


@each_elementwise_and_backend
def test_all_layouts_in_one_optimizer(case, backend, device):
    """On the compiled backend, in one call: no tensor may be taken in the order of another."""
    starts = [random_values(SHAPE, i, device) for i in range(len(DENSE))]
    gradients = [[random_values(SHAPE, 10 * k + i, device) for i in range(len(DENSE))] for k in range(3)]
    params = [Parameter(lay(start)) for lay, start in zip(DENSE.values(), starts, strict=True)]
    opt = optimizer(case.name, params, backend)
    layouts = itertools.cycle(DENSE.values())
    for row in gradients:
        next(layouts)  # another pairing of layouts in each step, and no gradient that stays where it was
        step(opt, params, [next(layouts)(g) for g in row])
    assert_is_reference(case.name, opt, params, starts, gradients)
    assert sum(bucket.tensors for bucket in to.explain(opt)) == len(DENSE)
    assert len(to.explain(opt)) == 1


@pytest.mark.parametrize("shape", [(3, 1, 4), (1, 5), (1, 1, 1), (2, 1, 1, 3)])
def test_strides_of_dimensions_of_size_1_mean_nothing(shape, backend, device):
    start, g = random_values(shape, 0, device), random_values(shape, 1, device)
    odd = [77 if size == 1 else stride for size, stride in zip(shape, start.stride(), strict=True)]
    p = Parameter(start.clone())
    q = Parameter(start.clone().as_strided(shape, odd))
    opt = optimizer("AdamW", [p, q], backend)
    step(opt, [p, q], [g.as_strided(shape, odd), g.clone()])
    assert_same(p, q)
    assert_is_reference("AdamW", opt, [p, q], [start, start], [[g, g]])


@pytest.mark.parametrize("layout", list(DENSE))
def test_gradient_in_the_parameters_layout_is_read_where_it_is(layout, device, launches):
    backend = "triton"
    p = Parameter(DENSE[layout](random_values(SHAPE, 0, device)))
    opt = optimizer("AdamW", [p], backend)
    for i in range(2):
        step(opt, [p], [DENSE[layout](random_values(SHAPE, 1 + i, device))])
        _, (_, tensors, gradients, *_), _ = launches[-1]
        assert gradients.tolist() == [p.grad.data_ptr()]
        assert tensors[0, 2:].tolist() == [t.data_ptr() for t in (p, *map(opt.state[p].get, ("exp_avg", "exp_avg_sq")))]


def test_convolution_trained_in_channels_last(backend, device):
    """Gradients as autograd lays them out, against torch.optim."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
        nets.append(net.to(device, memory_format=torch.channels_last))
    ours = to.AdamW(nets[0].parameters(), lr=1e-2, backend=backend)
    theirs = torch.optim.AdamW(nets[1].parameters(), lr=1e-2, foreach=False)
    for i in range(3):
        images = random_values((2, 3, 6, 6), i, device).to(memory_format=torch.channels_last)
        for net, opt in zip(nets, (ours, theirs), strict=True):
            opt.zero_grad()
            net(images).square().mean().backward()
            opt.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert p.stride() == q.stride()
        # Both are float32, and each step's gradients come from the parameters of the one before.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# States.


@pytest.mark.parametrize(
    ("case", "backend", "p_layout", "s_layout"),
    [
        pytest.param(case, *backend.values, *layouts, marks=backend.marks)
        for case in ELEMENTWISE
        for backend in BACKENDS
        if backend.values[0] == "eager" or case.on_every_backend
        for layouts in itertools.product(["contiguous", "channels_last"], [*DENSE, "gappy", "misaligned"])
        if case.name == "AdamW" or layouts in (("contiguous", "reversed"), ("channels_last", "contiguous"))
    ],
)
def test_states_loaded_in_another_layout(case, backend, p_layout, s_layout, device):
    start = random_values(SHAPE, 0, device)
    gradients = [random_values(SHAPE, 1 + i, device) for i in range(3)]
    p = Parameter(DENSE[p_layout](start))
    opt = optimizer(case.name, [p], backend)
    step(opt, [p], [gradients[0]])
    saved = opt.state_dict()
    for key, value in saved["state"][0].items():
        if key not in NUMBERS:
            saved["state"][0][key] = GRADIENTS[s_layout](value)
    opt = optimizer(case.name, [p], backend)
    opt.load_state_dict(saved)
    step(opt, [p], [gradients[1]])
    for key, value in list(opt.state[p].items()):  # and by hand
        if key not in NUMBERS:
            opt.state[p][key] = GRADIENTS[s_layout](value)
    step(opt, [p], [gradients[2]])
    assert_is_reference(case.name, opt, [p], [start], [[g] for g in gradients])


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
        step(opt, [p, q], [a.clone(), in_buffer(b, offset) if what == "gradient" else b.clone()])
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
            step(opt, params, [random_values(p.shape, 20, device) for p in params])
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
        step(opt, params, [in_buffer(g, offset) for g, offset in zip(gradients[-1], offsets, strict=True)])
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
        step(opt, [p, other], row)
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
        step(to.AdamW([x, y, z], backend=pinned), [x, y, z], [torch.ones_like(t) for t in (x, y, z)])
    assert torch.equal(base, before)
    assert torch.equal(x, random_values((2,), 1, device))


@pytest.mark.parametrize("choice", ["auto", "eager", "compiled", "cpp", "triton"])
def test_expanded_parameter_is_refused_and_nothing_changes(choice, device):
    """As by torch: what its one stored value should become is undefined. It stands last: all is checked first."""
    first, expanded = Parameter(random_values((2,), 1, device)), Parameter(random_values((1,), 0, device).expand(3))
    with pytest.raises(RuntimeError):  # when it is made, or at the latest here
        step(
            to.AdamW([first, expanded], backend=choice),
            [first, expanded],
            [torch.ones_like(t) for t in (first, expanded)],
        )
    assert torch.equal(first, random_values((2,), 1, device)), "half applied"
    assert torch.equal(expanded[0], random_values((1,), 0, device)[0])


def test_overlapping_windows_run_eagerly(device):
    """Rows (0, 1), (1, 2), (2, 3) of one buffer: what is in one row alone is exact, and nothing else is touched."""
    base = torch.arange(6.0, device=device)
    p = Parameter(base.as_strided((3, 2), (1, 1), 1))
    opt = to.SGD([p], lr=0.5)
    step(opt, [p], [torch.ones(3, 2, device=device)])
    assert [bucket.backend for bucket in to.explain(opt)] == ["eager"]
    assert base[[0, 1, 4, 5]].tolist() == [0.0, 0.5, 3.5, 5.0]


# Nothing, or next to nothing.


@each_elementwise_and_backend
def test_empty_and_0_dim_tensors(case, backend, device):
    shapes = [(0,), (), (3, 0, 2), (1,), (1, 1), (0, 5), (4,)]
    params = [Parameter(random_values(shape, i, device)) for i, shape in enumerate(shapes)]
    starts = [p.detach().clone() for p in params]
    gradients = [[random_values(shape, 10 * k + i, device) for i, shape in enumerate(shapes)] for k in range(1, 3)]
    opt = optimizer(case.name, params, backend)
    for row in gradients:
        step(opt, params, row)
    assert_is_reference(case.name, opt, params, starts, gradients)
    assert all(value.shape == p.shape for p in params for key, value in opt.state[p].items() if key not in NUMBERS)
    rows = [bucket for bucket in to.explain(opt) if bucket.elements]
    assert sum(bucket.tensors for bucket in rows) == 4, "an empty tensor reached the tables"
    assert [bucket.backend for bucket in rows] == [backend]


def test_nothing_but_empty_tensors(backend, device):
    p = Parameter(torch.empty(0, 3, device=device))
    opt = to.AdamW([p], backend=backend)
    for _ in range(2):
        step(opt, [p], [torch.empty(0, 3, device=device)])
    assert opt.state[p]["step"].item() == 2
    assert sum(bucket.launches for bucket in to.explain(opt)) == 0


def test_0_dim_float64_is_written(backend, device):
    """A graph compiled by torch 2.13 drops an in-place write to a 0-dim float64 tensor."""
    p = Parameter(torch.tensor(1.0, dtype=torch.float64, device=device))
    opt = to.AdamW([p], lr=0.5, weight_decay=0, backend=backend)
    step(opt, [p], [torch.tensor(3.0, dtype=torch.float64, device=device)])
    assert p.item() == pytest.approx(0.5, abs=1e-8)  # eps is 1e-8
    assert opt.state[p]["exp_avg"].item() == pytest.approx(0.3, abs=1e-15)


# Dtypes.

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [
    # parameter, gradient, states
    (F32, F32, F32),
    (F64, F64, F64),
    (BF16, BF16, BF16),
    (F16, F16, F16),
    (BF16, F32, BF16),
    (F32, BF16, F32),
    (BF16, BF16, F32),
    (F64, F32, F64),
]
# Rarer ones, on the backends that need no compilation for each.
MORE_DTYPES = [(F16, F32, F32), (F32, F64, F32), (F32, F32, BF16), (F32, F16, F64), (F64, F64, F32), (BF16, F16, F64)]


def dtype_id(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def states_like(p, dtype):
    """AdamW's states before the first step."""
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(p, dtype=dtype).detach(),
        "exp_avg_sq": torch.zeros_like(p, dtype=dtype).detach(),
    }


@pytest.mark.parametrize("dtypes", DTYPES + MORE_DTYPES, ids=dtype_id)
def test_gradients_and_states_of_another_dtype(dtypes, backend, device):
    if backend == "compiled" and dtypes in MORE_DTYPES:
        pytest.skip("each combination costs a compilation of seconds; the common ones are compiled")
    p_dtype, g_dtype, s_dtype = dtypes
    starts = [random_values(shape, i, device).to(p_dtype) for i, shape in enumerate([(37,), (4, 5)])]
    gradients = [[random_values(t.shape, 10 * k + 5, device).to(g_dtype) for t in starts] for k in range(3)]
    params = [Parameter(starts[0].clone()), Parameter(permuted(starts[1], 1, 0))]
    opt = optimizer("AdamW", params, backend)
    for p in params:
        opt.state[p].update(states_like(p, s_dtype))
    for row in gradients:
        step(opt, params, [g.clone() for g in row])
    assert_is_reference("AdamW", opt, params, starts, gradients)
    for p in params:
        assert (p.dtype, p.grad.dtype) == (p_dtype, g_dtype)
        assert {opt.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {s_dtype}
    (bucket,) = to.explain(opt)
    assert tuple(bucket.dtypes.values()) == (p_dtype, g_dtype, s_dtype, s_dtype)
    assert bucket.backend == backend


def test_every_dtype_is_a_bucket_of_its_own(backend, device):
    """In one optimizer, in two groups, step after step."""
    starts = [random_values((5, i + 1), i, device).to(dtypes[0]) for i, dtypes in enumerate(DTYPES)]
    gradients = [
        [random_values(t.shape, 9 * k, device).to(dtypes[1]) for t, dtypes in zip(starts, DTYPES, strict=True)]
        for k in range(2)
    ]
    params = [Parameter(start.clone()) for start in starts]
    opt = optimizer("AdamW", [{"params": params[::2]}, {"params": params[1::2]}], backend)
    flat = params[::2] + params[1::2]
    for p, dtypes in zip(params, DTYPES, strict=True):
        opt.state[p].update(states_like(p, dtypes[2]))
    for row in gradients:
        step(opt, flat, row[::2] + row[1::2])
    assert_is_reference("AdamW", opt, params, starts, gradients)
    assert sorted(tuple(map(str, bucket.dtypes.values()))[:3] for bucket in to.explain(opt)) == sorted(
        tuple(map(str, dtypes)) for dtypes in DTYPES
    )


def test_states_are_in_the_order_of_their_parameters(backend, device):
    """Whatever bucket each is in. Ranks that gather a state dict go by that order, and their buckets differ."""
    dtypes = [F32, F64, F32, F64]
    params = [
        Parameter(random_values((i,), i, device).to(dtype)) for i, dtype in enumerate(dtypes)
    ]  # the first is empty
    params.append(Parameter(in_buffer(random_values((5,), 5, device), 1)))
    params.append(Parameter(random_values((6,), 6, device)))
    opt = optimizer("AdamW", params, backend)
    step(opt, params, [torch.ones_like(p) for p in params])
    assert [next(i for i, p in enumerate(params) if p is q) for q in opt.state] == list(range(6))
    assert list(opt.state_dict()["state"]) == list(range(6))


def test_gradient_is_not_rounded_to_the_parameters_dtype(backend, device):
    """1 + 2^-10 is 1 in bfloat16; a float32 state must see the difference."""
    p = Parameter(torch.ones(3, dtype=BF16, device=device))
    opt = to.AdamW([p], betas=(0.5, 0.5), backend=backend)
    opt.state[p].update(states_like(p, F32))
    step(opt, [p], [torch.full((3,), 1 + 2**-10, device=device)])
    assert opt.state[p]["exp_avg"].tolist() == [0.5 + 2**-11] * 3


# Any of it together.


@st.composite
def models(draw):
    """(shape, order of the dimensions in memory, offset, dtypes, presence in each of 3 steps), a tensor."""
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
        order = draw(st.permutations(range(len(shape))))
        offset = draw(st.sampled_from([0, 0, 1, 4]))
        dtypes = draw(st.sampled_from(DTYPES))
        present = draw(st.lists(st.booleans(), min_size=3, max_size=3))
        tensors.append((shape, order, offset, dtypes, present))
    return tensors


def laid_out(values, order, offset):
    return in_buffer(permuted(values, *order) if order else values, offset)


def trained(model, backend, device, groups):
    """Optimizer, parameters, their starts and the gradients of all steps, after these steps."""
    starts = [random_values(shape, i, device).to(dtypes[0]) for i, (shape, _, _, dtypes, _) in enumerate(model)]
    params = [
        Parameter(laid_out(start, order, offset)) for start, (_, order, offset, _, _) in zip(starts, model, strict=True)
    ]
    gradients = [
        [
            random_values(shape, 10 * k + i, device).to(dtypes[1]) if present[k] else None
            for i, (shape, _, _, dtypes, present) in enumerate(model)
        ]
        for k in range(3)
    ]
    opt = optimizer("AdamW", [{"params": params[:groups]}, {"params": params[groups:]}], backend)
    for p, (_, _, _, dtypes, present) in zip(params, model, strict=True):
        if any(present):
            opt.state[p].update(states_like(p, dtypes[2]))
    for k, row in enumerate(gradients):
        # The first and last step's gradients lie as their parameters do, the second's the other way round.
        step(
            opt,
            params,
            [
                g if g is None else laid_out(g, order if k != 1 else order[::-1], offset * (k != 2))
                for g, (_, order, offset, _, _) in zip(row, model, strict=True)
            ],
        )
    return opt, params, starts, gradients


# A program costs the interpreter 20 ms. The same examples in each run: what fails once fails again.
@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(model=models(), groups=st.integers(0, 2))
def test_any_model_is_updated_as_by_the_reference_and_as_eagerly(backend, device, model, groups):
    assume(any(any(present) for *_, present in model))
    opt, params, starts, gradients = trained(model, backend, device, groups)
    assert_is_reference("AdamW", opt, params, starts, gradients)
    eager, eager_params, _, _ = trained(model, "eager", device, groups)
    for i, (p, q) in enumerate(zip(params, eager_params, strict=True)):
        states = ((opt.state[p][key], eager.state[q][key]) for key in opt.state.get(p, {}))
        for ours, other in ((p, q), *states):
            # One rounding of what is stored, as the arithmetic may fall on either side of a tie, and four in it.
            eps = torch.finfo(ours.dtype).eps + 4 * torch.finfo(F64 if p.dtype == F64 else F32).eps
            torch.testing.assert_close(ours, other, rtol=3 * eps, atol=3 * eps, msg=lambda m, i=i: f"tensor {i}: {m}")
