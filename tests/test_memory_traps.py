"""Memory and indexing: offsets past 32 bits, alignment, and writes outside of what an optimizer was given."""

import contextlib
import mmap
from typing import NamedTuple

import pytest
import torch
from conftest import HAS_GPU, HAS_TRITON
from launches import replace_launches
from table import OPTIONS_OF_KINDS
from torch.nn import Parameter

import triton_optim as to
from triton_optim.kernels.language import jit
from triton_optim.spec import State

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def step(opt, params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    opt.step()


def values(shape, seed, device, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# Trap 1: more than 2^31 elements.


def lazy_zeros(elements, dtype):
    """Zeros whose memory pages come into being when they are touched: any number of elements, for free."""
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except (OSError, MemoryError, OverflowError) as error:
        pytest.skip(f"no {elements * dtype.itemsize:,} bytes of address space here: {error}")
    return torch.frombuffer(memory, dtype=dtype)


# What must be noticed is noticed by C++, where gradients are gathered, and by Python.
BOTH_WAYS = pytest.mark.usefixtures("gradients_are")


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled for a GPU here, and the next test runs them")
def test_offsets_beyond_2_31_elements(monkeypatch):
    """The last three chunks of a parameter of 2^31 + 1,029 elements, all tables made as ever.

    In front of it lie 2^31 more: there a wrapped offset, being negative, would read and write.
    """
    from triton_optim.kernels.multi_tensor import BLOCK

    front, numel, apart = 2**31, 2**31 + BLOCK + 5, 64 * BLOCK
    memory = lazy_zeros(front + numel + 3 * apart, torch.float16)
    starts = [front + role * apart for role in range(4)]  # p, g, exp_avg, exp_avg_sq: in use are but their ends
    first = 2**31 - BLOCK
    ends = [memory[start + first : start + numel] for start in starts]
    for role, end in enumerate(ends):
        end.copy_(values(end.shape, role, "cpu").abs())
    wrapped = [memory[start - 2**31 : start - 2**31 + 4 * BLOCK] for start in starts]
    for stretch in wrapped:
        stretch.fill_(7)

    def optimizer(p, g, exp_avg, exp_avg_sq):
        p = Parameter(p)
        p.grad = g
        opt = to.AdamW([p], lr=0.1, backend="triton")
        opt.state[p].update(step=torch.tensor(3.0), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        return opt

    expected = [end.clone() for end in ends]
    optimizer(*expected).step()

    programs = []

    def launch_the_end(launcher, count, chunks, *others):
        assert count == len(chunks) == -(-numel // BLOCK)
        last = chunks[chunks[:, 1] >= first // BLOCK].contiguous()
        programs.append(len(last))
        launch(launcher, len(last), last, *others)

    launch = replace_launches(monkeypatch, launch_the_end)
    optimizer(*(memory[start : start + numel] for start in starts)).step()
    assert programs == [3]
    for stretch in wrapped:
        assert (stretch == 7).all(), "an offset has wrapped"
    for end, wanted in zip(ends, expected, strict=True):
        assert torch.equal(end, wanted)


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu(backend, device):
    needed = 60 if backend == "eager" else 12  # eager makes float32 copies of all of it
    if torch.cuda.mem_get_info()[0] < needed * 2**30:
        pytest.skip(f"needs {needed} GiB of free GPU memory")
    p = Parameter(torch.ones(2**31 + 1029, dtype=torch.bfloat16, device=device))
    p.grad = torch.ones_like(p).detach()
    p.grad[-1] = 2
    to.SGD([p], lr=0.5, backend=backend).step()
    assert p[-1].item() == 0
    assert (p[:-1] == 0.5).all()


def test_compiled_pieces_stay_under_2_31_elements(device, monkeypatch):
    """Inductor indexes by 32 bits on a GPU; longer tensors go through in pieces, the last one short."""
    from triton_optim.backends.compiled import graph as compiled_graph

    assert compiled_graph.LONGEST < 2**31
    start, gradients = values(2500, 0, device), [values(2500, 1, device), values(2500, 2, device)]
    results = []
    for longest in (compiled_graph.LONGEST, 1000):
        monkeypatch.setattr(compiled_graph, "LONGEST", longest)
        p = Parameter(start.clone())
        opt = to.AdamW([p], backend="compiled")
        for g in gradients:
            step(opt, [p], [g])
        results.append((p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=0, atol=0)


# Trap 2: empty shards, and very many tiny parameters.


def test_20_000_tiny_parameters_and_empty_ones_among_them(backend, device, monkeypatch):
    """They move as one long parameter does. In the interpreter (20 ms a program) the launch is read instead of run.

    On the eager backend, where nothing is done for all of them together, a tenth of them.
    """
    count = 2_000 if backend == "eager" else 20_000
    sizes = [(0, 1, 2, 3)[i % 4] for i in range(count)]
    start, g = values(sum(sizes), 0, device), values(sum(sizes), 1, device)
    params = [Parameter(p.clone()) for p in start.split(sizes)]
    opt = to.AdamW(params, lr=0.1, backend=backend)
    launches, interpreted = [], backend == "triton" and not HAS_GPU
    if interpreted:
        replace_launches(monkeypatch, lambda launcher, *given: launches.append((launcher.constants, *given)))
    step(opt, params, list(g.split(sizes)))
    assert all(opt.state[p]["step"].item() == 1 for p in params[:100])
    assert len(opt.state) == len(params)
    assert sum(bucket.tensors for bucket in to.explain(opt) if bucket.elements) == 3 * count // 4
    if interpreted:
        kinds = {constants["ALIGNED"]: (programs, tables) for constants, programs, *tables in launches}
        assert len(kinds) == len(launches)  # the gradients are slices of one buffer, so most are misaligned
        tensors = torch.cat([tables[1] for _, tables in kinds.values()])
        assert tensors[:, 0].bincount().tolist() == [0, 5000, 5000, 5000]
        for programs, (chunks, tensors, gradients, *_) in kinds.values():
            assert programs == len(chunks) == len(tensors) == len(gradients)
            assert torch.equal(chunks[:, 0], torch.arange(len(chunks), dtype=torch.int32))
            assert not chunks[:, 1].any()
        return
    whole = Parameter(start.clone())
    step(to.AdamW([whole], lr=0.1, backend=backend), [whole], [g])
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), whole.detach(), rtol=1e-6, atol=1e-7)


# Trap 3: an address says nothing about what lies there.


def sgd(params, backend):
    return to.SGD(params, lr=1.0, momentum=0.5, backend=backend)


@BOTH_WAYS
def test_data_replaced_by_its_transpose(backend, device):
    """The same address and the same shape."""
    p = Parameter(torch.zeros(2, 2, device=device))
    opt = sgd([p], backend)
    step(opt, [p], [torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)])
    p.data = p.data.t()
    step(opt, [p], [torch.tensor([[0.0, 8.0], [0.0, 0.0]], device=device)])
    # -[[1, 3], [2, 4]], less the new gradient plus half the old one, which the buffer holds for the old places.
    assert p.tolist() == [[-1.5, -12.0], [-3.5, -6.0]]


@BOTH_WAYS
def test_same_address_other_size(backend, device):
    base = torch.zeros(4, device=device)
    p = Parameter(base)
    opt = to.SGD([p], lr=1.0, backend=backend)
    step(opt, [p], [torch.ones(4, device=device)])
    p.grad = None
    p.data = base[:2]
    step(opt, [p], [torch.ones(2, device=device)])
    assert base.tolist() == [-2, -2, -1, -1]
    assert p.data_ptr() == base.data_ptr()
    p.grad = None
    p.data = base.view(2, 2)
    step(opt, [p], [torch.ones(2, 2, device=device)])
    assert base.tolist() == [-3, -3, -2, -2]


@BOTH_WAYS
def test_gradient_left_from_another_size_is_refused(backend, device):
    base = torch.zeros(4, device=device)
    p = Parameter(base)
    opt = to.SGD([p], lr=1.0, backend=backend)
    step(opt, [p], [torch.zeros(4, device=device)])
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
    step(opt, [p], [torch.zeros_like(p)])
    p.grad = None
    p.data = p.data.view(torch.bfloat16)
    step(opt, [p], [torch.full_like(p, 0.00390625)])
    assert p.dtype == torch.bfloat16
    assert p.tolist() == [0.00390625] * 4


@BOTH_WAYS
def test_storage_freed_and_made_anew(backend, device):
    """As training does that frees parameters between their uses."""
    p = Parameter(torch.zeros(1000, device=device))
    opt = sgd([p], backend)
    step(opt, [p], [torch.ones(1000, device=device)])
    size = p.untyped_storage().nbytes()
    p.untyped_storage().resize_(0)
    others = [torch.full((1000,), 5.0, device=device) for _ in range(8)]  # one of them may lie where p did
    p.untyped_storage().resize_(size)
    p.data.fill_(3)
    step(opt, [p], [torch.ones(1000, device=device)])
    assert p.tolist() == [1.5] * 1000
    assert all((other == 5).all() for other in others)


@BOTH_WAYS
def test_gradient_at_the_same_address_in_another_layout(backend, device):
    p, buffer = Parameter(torch.zeros(2, 2, device=device)), torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    opt = to.SGD([p], lr=1.0, backend=backend)
    for view in (buffer, buffer, buffer.t(), torch._neg_view(buffer), buffer):
        step(opt, [p], [view])
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
        step(opt, params, given)
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
    step(opt, params, ones)
    state = opt.state[params[place]]["momentum_buffer"]
    old = state.data
    before = old.clone()
    state.data = torch.full((4,), 10.0, device=device)
    step(opt, params, ones)
    assert opt.state[params[place]]["momentum_buffer"].tolist() == [6.0] * 4
    assert [p[0].item() for p in params] == [-7.0 if i == place else -2.5 for i in range(3)]
    assert torch.equal(old, before)


@BOTH_WAYS
def test_state_replaced_by_its_transpose(backend, device):
    """The same address and the same shape."""
    p = Parameter(torch.zeros(2, 2, device=device))
    opt = sgd([p], backend)
    step(opt, [p], [torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)])
    opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].t()
    step(opt, [p], [torch.zeros(2, 2, device=device)])
    assert p.tolist() == [[-1.5, -3.5], [-4.0, -6.0]]


@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed:UserWarning")  # Inductor's, when it compiles
@BOTH_WAYS
def test_state_replaced_at_the_same_address_in_another_dtype(backend, device):
    p = Parameter(torch.zeros(4, dtype=torch.float16, device=device))
    opt = sgd([p], backend)
    step(opt, [p], [torch.ones_like(p)])
    p.data.zero_()
    opt.state[p]["momentum_buffer"] = opt.state[p]["momentum_buffer"].view(torch.bfloat16)  # now 0.0078125
    step(opt, [p], [torch.zeros_like(p)])
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
        step(opt, params, [g[a : a + n] for a, n in spans])
        step(other, [whole], [g])
    padding = [a + n for a, n in spans]
    assert torch.equal(flat[padding], start[padding]), "padding was written to"
    inside = [i for a, n in spans for i in range(a, a + n)]
    torch.testing.assert_close(flat[inside], whole.detach()[inside], rtol=1e-6, atol=1e-7)
    assert sum(bucket.tensors for bucket in to.explain(opt)) == len(sizes)


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
        step(opt, params, [torch.ones_like(p) for p in params])
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


# Writes out of bounds, and reads of memory that nobody has written.

RULES = {
    "adam": (to.AdamW, {}),
    "amsgrad": (to.Adam, {"amsgrad": True}),
    "sgd": (to.SGD, {}),
    "momentum": (to.SGD, {"momentum": 0.9}),
    "nesterov": (to.SGD, {"momentum": 0.9, "nesterov": True}),
    "lion": (to.Lion, {}),
}
SIZES = (1, 17, 1023, 1024, 1025, 2049)  # around the kernel's block and a vector of the CPU


class Guarded:
    """A tensor between two bands of a number, one for each role: a NaN there would stay itself when written to."""

    def __init__(self, inside, role, offset):
        self.start, self.numel, self.mark = 64 + offset, inside.numel(), 100.0 * (role + 1)
        self.buffer = inside.new_full((inside.numel() + 128 + offset,), self.mark)
        self.inside = self.buffer[self.start : self.start + self.numel]
        self.inside.copy_(inside)

    def is_intact(self):
        outside = torch.cat((self.buffer[: self.start], self.buffer[self.start + self.numel :]))
        return bool((outside == self.mark).all())


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("rule", list(RULES))
def test_nothing_is_written_out_of_bounds(rule, offset, backend, device):
    """All sizes in one optimizer, and each in one of its own, which the compiled backend runs another way."""
    cls, options = RULES[rule]
    alone = [[n] for n in (*SIZES, 16385)] if backend == "compiled" else []
    for sizes in [list(SIZES), *alone]:
        guarded, params, twins = [], [], []
        for i, n in enumerate(sizes):
            roles = [Guarded(values(n, 10 * i + role, device).abs(), role, offset) for role in range(5)]
            guarded.append(roles)
            params.append(Parameter(roles[0].inside))
            twins.append(Parameter(roles[0].inside.clone()))
        opt, twin_opt = (cls(own, lr=0.1, **options, backend=backend) for own in (params, twins))
        names = opt.variant(opt.param_groups[0]).state_names
        for p, q, (_, g, *states) in zip(params, twins, guarded, strict=True):
            p.grad, q.grad = g.inside, g.inside.clone()
            for name, state in zip(names, states, strict=False):
                opt.state[p][name], twin_opt.state[q][name] = state.inside, state.inside.clone()
        gradients = [roles[1].inside.clone() for roles in guarded]
        opt.step()
        twin_opt.step()
        for roles, p, q, g in zip(guarded, params, twins, gradients, strict=True):
            assert all(role.is_intact() for role in roles), f"{sizes}: written outside"
            assert torch.equal(roles[1].inside, g), f"{sizes}: a gradient was written"
            assert p.isfinite().all()
            for ours, other in [(p, q), *((opt.state[p][name], twin_opt.state[q][name]) for name in names)]:
                torch.testing.assert_close(ours, other, rtol=1e-6 * ours.is_cuda, atol=0)


@pytest.fixture
def poisoned():
    """While it is entered, ``torch.empty`` is NaN."""

    @contextlib.contextmanager
    def poison():
        assert torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    return poison


@pytest.mark.parametrize(*OPTIONS_OF_KINDS)
def test_uninitialised_memory_is_never_read(case, options, backend, device, poisoned):
    """With gradients that must be brought into another layout, with and without a gradient."""
    results = []
    for context in (contextlib.nullcontext, poisoned):
        params = case.parameters(device)
        if not case.sparse:
            params[0].data = params[0].data.t().contiguous().t()
        with context():
            opt = case.ours(params, **options, backend=backend)
            random = torch.Generator().manual_seed(1)
            for k in range(2):
                gradients = [case.gradient(p, random) for p in params]
                step(opt, params, [*gradients[:-1], gradients[-1] if k else None])
        states = [s for p in params for s in opt.state.get(p, {}).values() if isinstance(s, torch.Tensor)]
        results.append([*(p.detach() for p in params), *states])
    for plain, same in zip(*results, strict=True):
        assert plain.isfinite().all()
        assert torch.equal(plain, same)
