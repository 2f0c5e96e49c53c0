"""Sharded parameters (DTensor): the kernels run on the local shards, and nothing else changes.

Most tests are one process that plays one rank after another of a process group which sends nothing ("fake"). What needs
communication runs on two processes over gloo, which are started once for the module.
"""

import contextlib
import copy
import datetime
import math
import os
import queue
import time
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import CPP, HAS_TRITON
from launches import replace_launches
from references import adamw
from table import CASES, rows, rows_and_backends
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import triton_optim as to
from triton_optim.engine.plan import Plan

RANKS = 4
SETTINGS = {"lr": 0.1, "weight_decay": 0.1}


@contextlib.contextmanager
def playing(rank, device, shape=(RANKS,)):
    """The device mesh as `rank` sees it."""
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        yield init_device_mesh(device.type, shape)
    finally:
        dist.destroy_process_group()


def own_part(full, mesh, placements):
    """What `placements` put on this rank: as torch.chunk cuts it, with nothing left for the last ranks."""
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = full.chunk(mesh.size(dim), placement.dim)
            place = mesh.get_local_rank(dim)
            full = parts[place] if place < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def sharded(full, mesh, placements, lay=torch.clone):
    local = lay(own_part(full, mesh, placements).contiguous())
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def values(shape, seed, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def array(t):
    return local(t.detach()).cpu().double().numpy()


def step(opt, params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    opt.step()


def assert_is_reference(opt, params, starts, gradients):
    """Local parts of parameters and states against the float64 reference; eight float32 roundings a step."""
    results, states = adamw(starts, gradients, **SETTINGS)
    tolerance = 8 * len(gradients) * 2**-23
    for i, (p, result, state) in enumerate(zip(params, results, states, strict=True)):
        assert opt.state[p]["step"].item() == state.pop("step")
        for name, expected in {"p": result, **state}.items():
            actual = array(p if name == "p" else opt.state[p][name])
            assert actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, tolerance, tolerance, err_msg=f"{name} of parameter {i}")


class Watch(TorchDispatchMode):
    """Lists the operations that reach a DTensor, and the collectives with what they carry."""

    def __init__(self):
        super().__init__()
        self.on_dtensors, self.collectives = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            self.on_dtensors.append(str(func))
        elif "c10d" in func.namespace and any(word in func.name() for word in ("all", "reduce")):
            carried = [(tuple(t.shape), t.dtype) for t in args if isinstance(t, torch.Tensor)]
            self.collectives.append((str(func), *carried))
        return func(*args, **(kwargs or {}))


# Any placement, on any rank.

PLACEMENTS = {
    "rows": ((RANKS,), [Shard(0)]),
    "columns": ((RANKS,), [Shard(1)]),
    "replicated": ((RANKS,), [Replicate()]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "rows twice": ((2, 2), [Shard(0), Shard(0)]),
}


@pytest.mark.parametrize("placed", list(PLACEMENTS))
def test_local_shards_are_updated_and_the_state_is_placed_as_its_parameter(placed, backend, device):
    """5 rows on 4 ranks are 2, 2, 1 and 0; beside them stands an ordinary parameter."""
    shape, placements = PLACEMENTS[placed]
    elements = []
    for rank in range(RANKS):
        with playing(rank, device, shape) as mesh:
            fulls = [values((5, 6), seed, device) for seed in range(3)]
            plains = [values((3,), 10 + seed, device) for seed in range(3)]
            params = [Parameter(sharded(fulls[0], mesh, placements)), Parameter(plains[0].clone())]
            starts = [array(p).copy() for p in params]
            opt = to.AdamW(params, **SETTINGS, backend=backend)
            given = []
            for full, plain in zip(fulls[1:], plains[1:], strict=True):
                gradients = [sharded(full, mesh, placements), plain]
                given.append([array(g) for g in gradients])
                step(opt, params, gradients)
            assert_is_reference(opt, params, starts, given)
            for name in ("exp_avg", "exp_avg_sq"):
                state = opt.state[params[0]][name]
                assert isinstance(state, DTensor)
                assert (state.placements, state.device_mesh) == (params[0].placements, mesh)
                assert (state.shape, state.stride()) == (params[0].shape, params[0].stride())
                assert not isinstance(opt.state[params[1]][name], DTensor)
            elements.append(sum(bucket.elements for bucket in to.explain(opt)) - 3)
    copies = {"replicated": RANKS, "hybrid": 2}.get(placed, 1)
    assert sum(elements) == copies * 30


def test_empty_shard_counts_its_steps_and_launches_nothing(backend, device, monkeypatch):
    if backend == "triton":
        replace_launches(monkeypatch, lambda *_: pytest.fail("launched for no element"))
    with playing(RANKS - 1, device) as mesh:
        full = values((5, 3), 0, device)
        p = Parameter(sharded(full, mesh, [Shard(0)]))
        opt = to.AdamW([p], backend=backend)
        for _ in range(3):
            step(opt, [p], [sharded(full, mesh, [Shard(0)])])
        assert opt.state[p]["step"].item() == 3
        assert opt.state[p]["exp_avg"].shape == (5, 3)
        assert opt.state[p]["exp_avg"].to_local().shape == (0, 3)
        assert sum(bucket.launches for bucket in to.explain(opt)) == 0


def misaligned(t):
    buffer = t.new_full((t.numel() + 2,), torch.nan)
    return buffer[1:-1].view(t.shape).copy_(t)


def transposed(t):
    return t.t().contiguous().t()


@pytest.mark.parametrize("of_state", [torch.clone, misaligned, transposed])
@pytest.mark.parametrize("of_gradient", [torch.clone, misaligned, transposed])
@pytest.mark.parametrize("of_parameter", [torch.clone, misaligned, transposed])
def test_layout_of_local_shards(of_parameter, of_gradient, of_state, backend, device):
    """Shards of flat buffers are misaligned; and global strides say nothing about those of a local tensor."""
    with playing(1, device) as mesh:
        fulls = [values((8, 3), seed, device) for seed in range(3)]
        p = Parameter(sharded(fulls[0], mesh, [Shard(0)], of_parameter))
        start = array(p).copy()
        opt = to.AdamW([p], **SETTINGS, backend=backend)
        step(opt, [p], [sharded(fulls[1], mesh, [Shard(0)], of_gradient)])
        for name in ("exp_avg", "exp_avg_sq"):
            shard = of_state(opt.state[p][name].to_local())
            opt.state[p][name] = DTensor.from_local(
                shard, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride()
            )
        step(opt, [p], [sharded(fulls[2], mesh, [Shard(0)], of_gradient)])
        given = [[array(sharded(full, mesh, [Shard(0)]))] for full in fulls[1:]]
        assert_is_reference(opt, [p], [start], given)
        for name in ("exp_avg", "exp_avg_sq"):
            assert (opt.state[p][name].placements, opt.state[p][name].shape) == (p.placements, p.shape)


def test_misaligned_shard_is_a_bucket_of_its_own(device):
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    with playing(0, device) as mesh:
        lays = [torch.clone, misaligned, torch.clone]
        params = [Parameter(sharded(values((5, 3), i, device), mesh, [Shard(0)], lay)) for i, lay in enumerate(lays)]
        opt = to.AdamW(params, backend="triton")
        for _ in range(2):
            step(opt, params, [sharded(values((5, 3), 9, device), mesh, [Shard(0)]) for _ in params])
        assert sorted((bucket.tensors, bucket.launches) for bucket in to.explain(opt)) == [(1, 1), (2, 1)]


# Gradients placed otherwise.


@pytest.mark.parametrize("rank", range(RANKS))
def test_replicated_gradient_of_a_sharded_parameter(rank, backend, device):
    with playing(rank, device) as mesh:
        start, full = values((5, 3), 0, device), values((5, 3), 1, device)
        p = Parameter(sharded(start, mesh, [Shard(0)]))
        before = array(p).copy()
        opt = to.AdamW([p], **SETTINGS, backend=backend)
        g = sharded(full, mesh, [Replicate()])
        step(opt, [p], [g])
        assert_is_reference(opt, [p], [before], [[array(sharded(full, mesh, [Shard(0)]))]])
        assert p.grad is g
        assert torch.equal(g.to_local(), full), "the gradient was written to"


def unequal_ranks(rank, case, backend, device):
    """The collectives that this rank issues in three steps, in which its shards differ from the other ranks'."""
    for dtype in (torch.float32, torch.float64):  # torch.compile refuses to compile under a dispatch mode
        p = Parameter(torch.ones(2, dtype=dtype, device=device))
        step(to.AdamW([p], backend=backend), [p], [torch.ones_like(p)])
    with playing(rank, device) as mesh:
        params = []
        for i, dtype in enumerate([torch.float32, torch.float64, torch.float32]):
            rows = 5 if case == "empty" and i == 0 else 8
            lay = misaligned if case == "misaligned" and i == 0 and rank == 1 else torch.clone
            params.append(Parameter(sharded(values((rows, 3), i, device).to(dtype), mesh, [Shard(0)], lay)))
        opt = to.AdamW(params, backend=backend)
        with Watch() as watch:
            for k in range(3):
                gradients = [torch.ones(p.shape, dtype=p.dtype, device=device) for p in params]
                if case == "moved" and k == 1 and rank == 1:
                    params[0].data = sharded(values((8, 3), 0, device), mesh, [Shard(0)])
                step(opt, params, [sharded(g, mesh, [Partial()]) for g in gradients])
        return watch.collectives


@pytest.mark.parametrize("case", ["alike", "empty", "misaligned", "moved"])
def test_every_rank_sums_partial_gradients_in_the_same_order(case, backend, device):
    """Else ranks wait for each other for ever, or sum what does not belong together. Once each, whatever is planned."""
    ranks = [unequal_ranks(rank, case, backend, device) for rank in range(RANKS)]
    assert len(ranks[0]) == 9, "3 parameters, 3 steps"
    for rank in range(1, RANKS):
        assert ranks[rank] == ranks[0], f"rank {rank}"


# Errors: nothing has changed after them.


def assert_refuses(opt, params):
    before = [array(p).copy() for p in params]
    with pytest.raises((RuntimeError, ValueError)):
        opt.step()
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert np.array_equal(array(p), old), f"parameter {i} was written"


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
def test_gradient_and_parameter_of_different_kinds(started, backend, device):
    with playing(1, device) as mesh:
        full = values((5, 3), 0, device)
        first = Parameter(torch.ones(2, device=device))
        for p, right, wrong in [
            (sharded(full, mesh, [Shard(0)]), sharded(full, mesh, [Shard(0)]), full),
            (full.clone(), full, sharded(full, mesh, [Replicate()])),
        ]:
            params = [first, Parameter(p)]
            opt = to.AdamW(params, backend=backend)
            if started:
                step(opt, params, [torch.ones_like(first), right])
            first.grad = torch.ones_like(first)
            try:
                params[1].grad = None
                params[1].grad = wrong
            except RuntimeError:  # torch refuses the assignment already
                continue
            assert_refuses(opt, params)


@pytest.mark.parametrize("kind", ["whole", "own rows", "replicated", "other dimension"])
@pytest.mark.parametrize("started", [False, True], ids=["fresh", "started"])
def test_state_placed_otherwise_than_its_parameter(kind, started, backend, device):
    """As after loading the state dict of an unsharded run: not one row may be taken for another."""
    with playing(1, device) as mesh:
        full = values((5, 3), 0, device)
        params = [Parameter(torch.ones(2, device=device)), Parameter(sharded(full, mesh, [Shard(0)]))]
        opt = to.AdamW(params, backend=backend)
        gradients = [torch.ones(2, device=device), sharded(full, mesh, [Shard(0)])]
        if started:
            step(opt, params, gradients)
        state = {
            "whole": full,
            "own rows": own_part(full, mesh, [Shard(0)]),
            "replicated": sharded(full, mesh, [Replicate()]),
            "other dimension": sharded(full, mesh, [Shard(1)]),
        }[kind]
        opt.state[params[1]]["exp_avg"] = state
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        assert_refuses(opt, params)


def test_state_on_another_dimension_of_the_mesh(backend, device):
    """Equal local shapes, other rows: this rank holds the first half of the parameter, the second of the state."""
    with playing(1, device, (2, 2)) as mesh:
        full = values((4, 3), 0, device)
        p = Parameter(sharded(full, mesh, [Shard(0), Replicate()]))
        opt = to.AdamW([p], backend=backend)
        opt.state[p]["exp_avg"] = sharded(full, mesh, [Replicate(), Shard(0)])
        assert opt.state[p]["exp_avg"].to_local().shape == p.to_local().shape
        p.grad = sharded(full, mesh, [Shard(0), Replicate()])
        assert_refuses(opt, [p])


# Trap 31: the cost.


def test_no_dtensor_dispatch_in_a_step(backend, device):
    with playing(0, device) as mesh:
        starts = [values((5, i + 1), i, device) for i in range(4)]
        counts = []
        for cls in (lambda p: to.AdamW(p, backend=backend), lambda p: torch.optim.AdamW(p, foreach=True)):
            params = [Parameter(sharded(start, mesh, [Shard(0)])) for start in starts]
            opt = cls(params)
            step(opt, params, [sharded(start, mesh, [Shard(0)]) for start in starts])
            for p, start in zip(params, starts, strict=True):
                p.grad = sharded(start, mesh, [Shard(0)])
            for group in opt.param_groups:
                group["lr"] = 0.5
            with Watch() as watch:
                opt.step()
            counts.append(len(watch.on_dtensors))
        ours, torchs = counts
        assert torchs > 0, "the counter does not see DTensor operations"
        assert ours == 0


def test_sharded_gradients_that_move_or_miss_a_step_plan_nothing_anew(backend, device, monkeypatch):
    plans, init = [], Plan.__init__

    def counted(self, *arguments, **more):
        plans.append(self)
        init(self, *arguments, **more)

    monkeypatch.setattr(Plan, "__init__", counted)
    with playing(1, device) as mesh:
        params = [Parameter(sharded(values((5, 3), i, device), mesh, [Shard(0)])) for i in range(3)]
        starts, opt = [array(p).copy() for p in params], to.AdamW(params, **SETTINGS, backend=backend)
        given = []
        for k, present in enumerate([(1, 1, 1), (1, 0, 1), (0, 0, 0), (0, 1, 0), (1, 1, 1)]):
            row = [
                sharded(values((5, 3), 10 * k + i, device), mesh, [Shard(0)]) if there else None
                for i, there in enumerate(present)
            ]
            given.append([None if g is None else array(g) for g in row])
            step(opt, params, row)
        assert_is_reference(opt, params, starts, given)
    assert len(plans) == 1


# Two processes.


def serve(rank, path, tasks, results):
    """What a rank does: run functions of this module by name, until there are no more."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    mesh = init_device_mesh("cpu", (2,))
    while (task := tasks.get()) is not None:
        name, arguments = task
        try:
            torch.manual_seed(0)
            results.put((None, globals()[name](mesh, *arguments)))
        except Exception:
            results.put((traceback.format_exc(), None))
            break
    dist.destroy_process_group()


@pytest.mark.parametrize("backend_name", ["eager", "compiled", pytest.param("cpp", marks=CPP)])
def test_shards_are_rounded_with_the_bits_of_the_whole(backend_name, device):
    options = {"param_precision": "stochastic", "state_dtype": torch.bfloat16, "backend": backend_name}
    start, gradient = (values((5, 3), seed, device).to(torch.bfloat16) for seed in (0, 1))
    whole = Parameter(start.clone())
    step(to.AdamW([whole], **SETTINGS, **options), [whole], [gradient])
    for rank in range(RANKS):
        with playing(rank, device) as mesh:
            p = Parameter(sharded(start, mesh, [Shard(0)]))
            step(to.AdamW([p], **SETTINGS, **options), [p], [sharded(gradient, mesh, [Shard(0)])])
            assert torch.equal(local(p.detach()), own_part(whole.detach(), mesh, [Shard(0)]))


def test_shards_of_columns_are_not_rounded_stochastically(device):
    with playing(0, device) as mesh:
        p = Parameter(sharded(values((2, 8), 0, device).to(torch.bfloat16), mesh, [Shard(1)]))
        opt = to.AdamW([p], **SETTINGS, param_precision="stochastic", backend="eager")
        with pytest.raises(RuntimeError, match="whole rows"):
            step(opt, [p], [sharded(values((2, 8), 1, device).to(torch.bfloat16), mesh, [Shard(1)])])


class Ranks:
    """Two processes over gloo, on the CPU; started anew after a failure."""

    def __init__(self, folder):
        self.folder, self.started, self.processes = folder, 0, []

    def start(self):
        context = torch.multiprocessing.get_context("spawn")
        self.started += 1
        self.tasks, self.results = ([context.Queue() for _ in range(2)] for _ in range(2))
        path = self.folder / f"store-{self.started}"
        self.processes = [
            context.Process(target=serve, args=(rank, path, self.tasks[rank], self.results[rank]), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments):
        """What both ranks return for ``function(mesh, *arguments)``."""
        if not self.processes:
            self.start()
        for tasks in self.tasks:
            tasks.put((function.__name__, arguments))
        answers = [self.answer(rank, since=time.monotonic()) for rank in range(2)]
        if any(error for error, _ in answers):
            self.stop()
            pytest.fail("\n".join(f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers)))
        return [answer for _, answer in answers]

    def answer(self, rank, since):
        """(why there is no answer or None, the answer)."""
        while time.monotonic() < since + 180:
            alive = self.processes[rank].is_alive()
            try:
                return self.results[rank].get(timeout=1)
            except queue.Empty:
                if not alive:
                    return f"died with exit code {self.processes[rank].exitcode}", None
        return "no answer in 180 s: the ranks wait for each other", None

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "GLOO_SOCKET_IFNAME")}
    os.environ["TRITON_INTERPRET"] = "1"  # the tensors lie on the CPU, whatever else the machine has
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name may not resolve
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    try:
        ranks.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    yield ranks
    for tasks in ranks.tasks:
        tasks.put(None)
    for process in ranks.processes:
        process.join(timeout=20)
    ranks.stop()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def fully_sharded(mesh):
    """5 rows are 3 and 2 on the ranks, 1 row is 1 and 0."""
    net = network()
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train(net, opt, steps, rank=None):
    """Mean squares over a batch for each of `steps`, or over a rank's half of it."""
    for k in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(k))
        x = x if rank is None else x.chunk(2)[rank]
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


def whole(opt, net):
    """Full parameters and states, by name."""
    found = {}
    for name, p in net.named_parameters():
        for key, t in {"p": p, **opt.state[p]}.items():
            t = t.detach()
            found[name, key] = (t.full_tensor() if isinstance(t, DTensor) else t).tolist()
    return found


def fsdp(mesh, name, backend):
    """After 4 steps: fully sharded on two ranks, and on one."""
    net, twin = fully_sharded(mesh), network()
    sort = to.muon_param_groups if issubclass(getattr(to, name), to.Muon) else torch.nn.Module.parameters
    opt, twin_opt = (getattr(to, name)(sort(each), lr=0.05, backend=backend) for each in (net, twin))
    train(net, opt, range(4), mesh.get_local_rank())
    train(twin, twin_opt, range(4))
    elements = sum(bucket.elements for bucket in to.explain(opt))
    return whole(opt, net), whole(twin_opt, twin), elements


@rows_and_backends(*(case for case in CASES if case.elementwise and not case.sparse))
def test_fully_sharded_training_is_unsharded_training(case, ranks, backend):
    agree(ranks.run(fsdp, case.name, backend))


# What comes before the rule is the same in front of every backend.
@rows(*(case for case in CASES if not case.elementwise))
def test_whole_matrices_of_fully_sharded_parameters(case, ranks):
    agree(ranks.run(fsdp, case.name, "eager"))


def agree(runs):
    first, second = runs
    assert first[0] == second[0]
    assert (first[2], second[2]) == (9 + 3 + 5 + 1, 6 + 2)
    for key, expected in first[1].items():
        # Gradients are means of two halves instead of one mean, and rounding is passed on from step to step.
        np.testing.assert_allclose(first[0][key], expected, rtol=1e-4, atol=1e-5, err_msg=str(key))


def partial_gradients(mesh, backend):
    rank = mesh.get_local_rank()
    results = []
    for placement in (Replicate(), Shard(0)):
        p = Parameter(sharded(torch.zeros(3, 2), mesh, [placement]))
        opt = to.SGD([p], lr=1.0, backend=backend)
        for k in range(2):
            # Without the sum each rank would go its own way: 1 + 2 in the first step, 10 times that in the second.
            g = DTensor.from_local(torch.full((3, 2), (rank + 1) * 10.0**k), mesh, [Partial()], run_check=False)
            step(opt, [p], [g])
        results.append(p.detach().full_tensor().tolist())
    return results


def test_partial_gradients_are_summed(ranks, backend):
    for results in ranks.run(partial_gradients, backend):
        assert results == [[[-33.0] * 2] * 3] * 2


def infinite_norms(mesh):
    """The largest magnitude, with a NaN on the first rank, on the second, on none."""
    norms = []
    for bad in (0, 1, None):
        own = torch.full((2,), 1.0 + mesh.get_local_rank())
        if bad == mesh.get_local_rank():
            own[1] = math.nan
        p = Parameter(DTensor.from_local(torch.zeros_like(own), mesh, [Shard(0)], run_check=False))
        p.grad = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        norms.append(to.clip_grad_norm_([p], 1e9, math.inf).item())
    return norms


def test_a_nan_on_one_rank_is_in_the_largest_magnitude(ranks):
    for norms in ranks.run(infinite_norms):
        np.testing.assert_array_equal(norms, [math.nan, math.nan, 2.0])


def checkpoint(mesh, backend, folder, full):
    """Train 2 steps, save, and 2 more; load into another model and optimizer, and train these for the last 2."""
    rank, options = mesh.get_local_rank(), StateDictOptions(full_state_dict=full)
    net, again = fully_sharded(mesh), fully_sharded(mesh)
    opt, opt_again = to.AdamW(net.parameters(), lr=0.05, backend=backend), to.AdamW(again.parameters(), backend=backend)
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)
    train(net, opt, range(2), rank)
    saved = whole(opt, net)
    model_state, opt_state = get_state_dict(net, opt, options=options)
    if full:
        model_state, opt_state = copy.deepcopy((model_state, opt_state))  # else it would train on
    else:
        save({"model": model_state, "opt": opt_state}, checkpoint_id=folder)
        model_state, opt_state = get_state_dict(again, opt_again, options=options)
        load({"model": model_state, "opt": opt_state}, checkpoint_id=folder)
    train(net, opt, range(2, 4), rank)
    set_state_dict(again, opt_again, model_state_dict=model_state, optim_state_dict=opt_state, options=options)
    loaded = whole(opt_again, again)
    placed = [
        isinstance(t, DTensor) and t.placements == p.placements
        for p in again.parameters()
        for key, t in opt_again.state[p].items()
        if key != "step"
    ]
    train(again, opt_again, range(2, 4), rank)
    return saved, loaded, placed, opt_again.param_groups[0]["lr"], whole(opt, net), whole(opt_again, again)


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_checkpoint_round_trip(full, ranks, backend, tmp_path):
    for saved, loaded, placed, lr, straight, resumed in ranks.run(checkpoint, backend, str(tmp_path), full):
        assert loaded == saved
        assert all(placed)
        assert len(placed) == 8
        assert lr == 0.05
        assert resumed == straight
