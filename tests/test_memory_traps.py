"""Memory and indexing: offsets past 32 bits, alignment, and writes outside of what an optimizer was given."""

import contextlib
import mmap

import pytest
import torch
from conftest import HAS_GPU, HAS_TRITON
from launches import replace_launches
from one_step import step_with
from sharding import values
from table import OPTIONS_OF_KINDS
from torch.nn import Parameter

import triton_optim as to

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


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
            step_with(opt, [p], [g])
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
    step_with(opt, params, list(g.split(sizes)))
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
    step_with(to.AdamW([whole], lr=0.1, backend=backend), [whole], [g])
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), whole.detach(), rtol=1e-6, atol=1e-7)


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
                step_with(opt, params, [*gradients[:-1], gradients[-1] if k else None])
        states = [s for p in params for s in opt.state.get(p, {}).values() if isinstance(s, torch.Tensor)]
        results.append([*(p.detach() for p in params), *states])
    for plain, same in zip(*results, strict=True):
        assert plain.isfinite().all()
        assert torch.equal(plain, same)
