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
from laid_out import (
    DENSE,
    ELEMENTWISE,
    GRADIENTS,
    SHAPE,
    assert_is_reference,
    assert_same,
    each_elementwise_and_backend,
    in_buffer,
    optimizer,
    permuted,
    random_values,
)
from one_step import step_with
from torch.nn import Parameter

import triton_optim as to

pytestmark = pytest.mark.usefixtures("two_slots")


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
        step_with(plain_opt, [plain], [g.clone()])
        step_with(opt, [p], [laid])
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
        step_with(opt, params, [next(layouts)(g) for g in row])
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
    step_with(opt, [p, q], [g.as_strided(shape, odd), g.clone()])
    assert_same(p, q)
    assert_is_reference("AdamW", opt, [p, q], [start, start], [[g, g]])


@pytest.mark.parametrize("layout", list(DENSE))
def test_gradient_in_the_parameters_layout_is_read_where_it_is(layout, device, launches):
    backend = "triton"
    p = Parameter(DENSE[layout](random_values(SHAPE, 0, device)))
    opt = optimizer("AdamW", [p], backend)
    for i in range(2):
        step_with(opt, [p], [DENSE[layout](random_values(SHAPE, 1 + i, device))])
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
    step_with(opt, [p], [gradients[0]])
    saved = opt.state_dict()
    for key, value in saved["state"][0].items():
        if key not in case.numbers:
            saved["state"][0][key] = GRADIENTS[s_layout](value)
    opt = optimizer(case.name, [p], backend)
    opt.load_state_dict(saved)
    step_with(opt, [p], [gradients[1]])
    for key, value in list(opt.state[p].items()):  # and by hand
        if key not in case.numbers:
            opt.state[p][key] = GRADIENTS[s_layout](value)
    step_with(opt, [p], [gradients[2]])
    assert_is_reference(case.name, opt, [p], [start], [[g] for g in gradients])


# Nothing, or next to nothing.


@each_elementwise_and_backend
def test_empty_and_0_dim_tensors(case, backend, device):
    shapes = [(0,), (), (3, 0, 2), (1,), (1, 1), (0, 5), (4,)]
    params = [Parameter(random_values(shape, i, device)) for i, shape in enumerate(shapes)]
    starts = [p.detach().clone() for p in params]
    gradients = [[random_values(shape, 10 * k + i, device) for i, shape in enumerate(shapes)] for k in range(1, 3)]
    opt = optimizer(case.name, params, backend)
    for row in gradients:
        step_with(opt, params, row)
    assert_is_reference(case.name, opt, params, starts, gradients)
    assert all(value.shape == p.shape for p in params for key, value in opt.state[p].items() if key not in case.numbers)
    rows = [bucket for bucket in to.explain(opt) if bucket.elements]
    assert sum(bucket.tensors for bucket in rows) == 4, "an empty tensor reached the tables"
    assert [bucket.backend for bucket in rows] == [backend]


def test_nothing_but_empty_tensors(backend, device):
    p = Parameter(torch.empty(0, 3, device=device))
    opt = to.AdamW([p], backend=backend)
    for _ in range(2):
        step_with(opt, [p], [torch.empty(0, 3, device=device)])
    assert opt.state[p]["step"].item() == 2
    assert sum(bucket.launches for bucket in to.explain(opt)) == 0


def test_0_dim_float64_is_written(backend, device):
    """A graph compiled by torch 2.13 drops an in-place write to a 0-dim float64 tensor."""
    p = Parameter(torch.tensor(1.0, dtype=torch.float64, device=device))
    opt = to.AdamW([p], lr=0.5, weight_decay=0, backend=backend)
    step_with(opt, [p], [torch.tensor(3.0, dtype=torch.float64, device=device)])
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
        step_with(opt, params, [g.clone() for g in row])
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
        step_with(opt, flat, row[::2] + row[1::2])
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
    step_with(opt, params, [torch.ones_like(p) for p in params])
    assert [next(i for i, p in enumerate(params) if p is q) for q in opt.state] == list(range(6))
    assert list(opt.state_dict()["state"]) == list(range(6))


def test_gradient_is_not_rounded_to_the_parameters_dtype(backend, device):
    """1 + 2^-10 is 1 in bfloat16; a float32 state must see the difference."""
    p = Parameter(torch.ones(3, dtype=BF16, device=device))
    opt = to.AdamW([p], betas=(0.5, 0.5), backend=backend)
    opt.state[p].update(states_like(p, F32))
    step_with(opt, [p], [torch.full((3,), 1 + 2**-10, device=device)])
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
        step_with(
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
