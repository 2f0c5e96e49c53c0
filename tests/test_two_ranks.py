"""Sharded parameters that need communication: two processes over gloo, which are started once for the module."""

import copy
import datetime
import inspect
import itertools
import math
import os
import queue
import re
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from resharding import RULES, Job, Kept, changed, outcomes
from sharding import Watch, local, sharded, step, values
from table import CASES, KINDS, rows, rows_and_backends
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

import triton_optim as to
from triton_optim.kernels.language import jit
from triton_optim.optimizers.matrix import muon, owners
from triton_optim.optimizers.matrix.newton_schulz import newton_schulz

PAGES = Path(__file__).parents[1] / "docs" / "trainers"


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
    cls = getattr(to, name)
    sort = to.muon_param_groups if issubclass(cls, to.Muon) else torch.nn.Module.parameters
    options = {"lr": 0.05, "backend": backend}
    if "max_precond_dim" in inspect.signature(cls).parameters:
        # Of longer sides some eigenvalues are 0, and rounding decides which eigenvectors are taken.
        options |= {"max_precond_dim": 3, "precondition_frequency": 2}
    opt, twin_opt = (cls(sort(each), **options) for each in (net, twin))
    train(net, opt, range(4), mesh.get_local_rank())
    train(twin, twin_opt, range(4))
    elements = sum(bucket.elements for bucket in to.explain(opt))
    return whole(opt, net), whole(twin_opt, twin), elements


@rows_and_backends(*(case for case in KINDS if case.elementwise and not case.sparse))
def test_fully_sharded_training_is_unsharded_training(case, ranks, backend):
    agree(ranks.run(fsdp, case.name, backend))


# What comes before the rule is the same in front of every backend.
@rows(*(case for case in CASES if not case.elementwise))
def test_whole_matrices_of_fully_sharded_parameters(case, ranks):
    agree(ranks.run(fsdp, case.name, "eager"))


def bytes_of_states(mesh, name):
    """As reported before the first step, and of the states after it."""
    net = fully_sharded(mesh)
    opt = getattr(to, name)(net.parameters(), backend="eager")
    reported = sum(to.memory_report(opt).states.values())
    train(net, opt, range(1), mesh.get_local_rank())
    states = [t for state in opt.state.values() for key, t in state.items() if key != "step"]
    return reported, sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in states)


@pytest.mark.parametrize("name", ["SOAP", "CAME"])
def test_memory_of_states_that_every_rank_has_whole(name, ranks):
    runs = ranks.run(bytes_of_states, name)
    for reported, there in runs:
        assert reported == there
    assert runs[0] != runs[1]


def agree(runs):
    first, second = runs
    assert first[0] == second[0]
    assert (first[2], second[2]) == (9 + 3 + 5 + 1, 6 + 2)
    for key, expected in first[1].items():
        # Gradients are means of two halves instead of one mean, and rounding is passed on from step to step.
        np.testing.assert_allclose(first[0][key], expected, rtol=1e-4, atol=1e-5, err_msg=str(key))


def hybrid(mesh, shape):
    """How far Muon, and AdamW with codes, are from one process after 3 steps on the same batches."""
    mesh, found = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")), []
    for name in ("Muon", "AdamW"):
        weights = []
        for where in (mesh, None):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(64, 130), torch.nn.Tanh(), torch.nn.Linear(130, 7))
            for part in (net[0], net[2], net) if where else ():
                fully_shard(part, mesh=where)
            if name == "Muon":
                opt = to.Muon(to.muon_param_groups(net, heads=[]), lr=0.02, backend="eager")
            else:
                opt = to.AdamW(net.parameters(), lr=0.01, state_dtype="int8", max_grad_norm=0.5, backend="eager")
            for k in range(3):
                x = torch.randn(16, 64, generator=torch.Generator().manual_seed(k))
                opt.zero_grad()
                net(x).square().mean().backward()
                opt.step()
            weights.append([(p.full_tensor() if where else p).detach() for p in net.parameters()])
        found.append(max((p - q).abs().max().item() for p, q in zip(*weights, strict=True)))
    return found


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["replicated", "sharded"])
def test_hybrid_shards(shape, ranks):
    """Codes of a shard are in blocks of its own, so that they differ from those of the whole by roundings."""
    for matrices, codes in ranks.run(hybrid, shape):
        assert matrices < 2**-20
        assert codes <= (0 if shape == (2, 1) else 0.005)  # half a step of AdamW


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


class SumScalars(NamedTuple):
    total: float


@jit
def moved_by_the_sum(p, g, h):
    return (p - h.total,)


@jit
def the_gradient(p, g, h):
    return (g,)


class MovedByTheSum(to.RuleOptimizer):
    """Moves all parameters by the sum of all gradients."""

    rule, measure = moved_by_the_sum, the_gradient

    def __init__(self, params, **options):
        super().__init__(params, {"lr": 1.0}, **options)

    def scalars(self, group, step):
        return SumScalars(0.0)

    def total(self, measured):
        return sum(m.sums[0].sum() for m in measured)

    def factors(self, measured):
        return {"total": measured.total}


def total(mesh):
    """A sum that depends on its order: the second rank has nothing of the second of three parameters."""
    own = [torch.tensor([each]) for each in (1e16, 1.0, -1e16)]
    params = []
    for x, shape in zip(own, (2, 1, 2), strict=True):
        part = sharded(torch.zeros(shape), mesh, [Shard(0)])
        params.append(Parameter(part))
        params[-1].grad = sharded(x.expand(shape).clone() / shape, mesh, [Shard(0)])
    MovedByTheSum(params, backend="eager").step()
    return [p.detach().full_tensor().tolist() for p in params]


def test_sums_over_the_model_are_the_same_on_every_rank(ranks):
    first, second = ranks.run(total)
    assert first == second
    assert len({x for own in first for x in own}) == 1


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


# Each kind of what is kept; whole matrices; and one that has states before its first step.
RESHARDED = {
    "nested": [
        Job(RULES["AdamW"], Kept("int8", "float32", False)),
        Job(RULES["AdamW"], Kept(torch.bfloat16, "stochastic", True)),
        Job(RULES["AdamW"], Kept(None, "kahan", False)),
        Job(RULES["Muon"], Kept("int8", "float32", False)),
        Job(RULES["Adafactor"], Kept(None, "float32", True)),
    ],
    "flat": [
        Job(RULES["AdamW"], Kept("int8", "split32", True)),
        Job(RULES["AdamW"], Kept("int4", "master", False)),
        Job(RULES["SOAP"], Kept(None, "float32", False)),
        Job(RULES["Adagrad"], Kept("int8", "split32", True)),
    ],
    "async": [Job(RULES["AdamW"], Kept("int4", "split24", True))],
}


def resharded(mesh, folder):
    meshes, found = {1: DeviceMesh("cpu", [0]), 2: mesh}, []
    for how, jobs in RESHARDED.items():
        named = {f"{job.case.name}, {job.kept}, {how}": job for job in jobs}
        pairs = [*itertools.product(meshes, meshes)]
        found += outcomes(named, meshes, Path(folder) / how, pairs, how).items()
    return dict(found)


def test_checkpoints_on_another_number_of_ranks(ranks, tmp_path):
    """``benchmarks/dcp_matrix.py`` takes all optimizers and options, and four ranks."""
    found = ranks.run(resharded, str(tmp_path))[0]
    assert len(found) == 4 * sum(map(len, RESHARDED.values()))
    assert {name: one for name, one in found.items() if not one.good} == {}


FLOAT32, STORED = Kept(None, "float32", False), Kept(None, "storage", False)
# What is saved, and what it is loaded into; and where the checkpoint lacks some of that.
CHANGED = [
    (FLOAT32._replace(states=torch.float32), FLOAT32._replace(states="int8")),
    (FLOAT32._replace(states="int8"), FLOAT32),
    (FLOAT32._replace(states="int8"), FLOAT32._replace(states="int4")),
    (FLOAT32._replace(states="int4"), FLOAT32._replace(states=torch.float32)),
    (FLOAT32._replace(averages=True), FLOAT32),
    (STORED._replace(precision="split32"), STORED),
]
LACKING = [
    (FLOAT32, FLOAT32._replace(states="int8")),
    (FLOAT32, FLOAT32._replace(averages=True)),
    (STORED, STORED._replace(precision="master")),
    (STORED, STORED._replace(precision="split24", states="int4")),
]


def with_other_options(mesh, folder):
    found = []
    for partial, pairs in ((False, CHANGED), (True, LACKING)):
        jobs = {f"{a} to {b}": (Job(RULES["AdamW"], a), Job(RULES["AdamW"], b)) for a, b in pairs}
        for how, where in (("nested", mesh), ("flat", mesh), ("nested", None)):
            name = f"{how}{', whole' if where is None else ''}{', partial' if partial else ''}"
            own = changed(jobs, where, Path(folder) / name, how, partial)
            found += [((job, name), one) for job, one in own.items()]
    return dict(found)


def test_a_checkpoint_goes_into_other_options(ranks, tmp_path):
    for found in ranks.run(with_other_options, str(tmp_path)):
        assert {name: one for name, one in found.items() if not one.good} == {}
        assert max(one.later for one in found.values()) < 0.02


def flattened_by_fsdp(mesh, state_dtype, precision):
    """The values of states after a checkpoint by FullyShardedDataParallel's own functions, and before."""
    from torch.distributed.fsdp import ShardedOptimStateDictConfig, ShardedStateDictConfig, StateDictType

    dtype = torch.float32 if precision == "storage" else torch.bfloat16
    options = {"lr": 0.05, "state_dtype": state_dtype, "param_precision": precision, "backend": "eager"}
    nets, opts = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(96, 100), torch.nn.Tanh(), torch.nn.Linear(100, 1)).to(dtype)
        nets.append(FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True))
        opts.append(to.AdamW(nets[-1].parameters(), **options))
    for which in ((0,), (0, 1)):
        for net, opt in ((nets[i], opts[i]) for i in which):
            for k in range(2):
                x = torch.randn(8, 96, generator=torch.Generator().manual_seed(k)).to(dtype)
                net(x).square().mean().backward()
                opt.step()
                opt.zero_grad()
        if which == (0,):
            kinds = StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
            for net in nets:
                FullyShardedDataParallel.set_state_dict_type(net, *kinds)
            nets[1].load_state_dict(nets[0].state_dict())
            saved = FullyShardedDataParallel.optim_state_dict(nets[0], opts[0])
            opts[1].load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(nets[1], opts[1], saved))
    own = [[{"p": p, **opt.state[p]} for p in net.parameters()] for net, opt in zip(nets, opts, strict=True)]
    return [
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(*own, strict=True)
    ]


@pytest.mark.parametrize(
    ("state_dtype", "precision"),
    [("int8", "storage"), (None, "split32"), ("int8", "split32"), (torch.float32, "master")],
    ids=str,
)
def test_states_of_parameters_that_fsdp_flattened_are_resumed(state_dtype, precision, ranks):
    for same in ranks.run(flattened_by_fsdp, state_dtype, precision):
        assert same == [True] * 4


def strided_shards(mesh):
    """Norms of a matrix in strided shards, which FSDP makes of what tensor parallel has cut."""
    rank = mesh.get_local_rank()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    placed, own = (_StridedShard(0, split_factor=1), Shard(0)), slice(2 * rank, 2 * rank + 2)
    start, g = torch.ones(4, 3), torch.arange(12.0).reshape(4, 3)

    def there(full):
        return DTensor.from_local(full[own].clone(), mesh, placed, run_check=False, shape=(4, 3), stride=(3, 1))

    p, twin, norms = Parameter(there(start)), Parameter(start.clone()), []
    for kind in (2.0, math.inf):
        p.grad = there(g)
        norms.append(to.clip_grad_norm_([p], 1e9, kind).item())
    for optimizer in (to.LAMB([p], lr=0.1, max_grad_norm=1e9), to.LAMB([twin], lr=0.1)):
        p.grad, twin.grad = there(g), g.clone()
        optimizer.step()
        norms += [optimizer.grad_norm.item()] if optimizer.grad_norm is not None else []
    return norms, (p.detach().to_local() - twin.detach()[own]).abs().max().item()


def test_strided_shards_are_counted_on_every_rank(ranks):
    for norms, apart in ranks.run(strided_shards):
        np.testing.assert_allclose(norms, [506**0.5, 11.0, 506**0.5], rtol=1e-6)
        assert apart < 1e-6


def message_of(function):
    """What it raises."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return ""


def wrapped_by_others(mesh):
    """What is said where others average the gradients, or hand out parts of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of torch.jit

    x, said = torch.ones(2, 3), []
    net = DistributedDataParallel(network())
    opt = to.SGD(net.parameters(), lr=0.1)
    handle = to.enable_gradient_release(opt)
    said.append(message_of(lambda: net(x).sum().backward()))
    handle.remove()
    net.zero_grad()
    net(x).sum().backward()
    opt.step()  # as ever
    zero = ZeroRedundancyOptimizer(net.parameters(), to.AdamW, lr=0.1, max_grad_norm=1.0)
    said.append(message_of(zero.step))
    plain = to.AdamW(net.parameters(), lr=0.1, max_grad_norm=1.0)  # which sees all
    said.append(message_of(plain.step))
    for own in (True, False):
        flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=own)
        opt = to.AdamW(flat.parameters(), lr=0.1, max_grad_norm=1.0)
        flat(x).sum().backward()
        said.append(message_of(opt.step))
        opt.max_grad_norm = None
        said.append(message_of(opt.step))
        said += [message_of(kind(flat.parameters()).step) for kind in (to.LAMB, to.Adafactor)]
    zero = ZeroRedundancyOptimizer(net.parameters(), to.Prodigy, lr=1.0)
    return [*said, message_of(zero.step)]


def test_what_others_do_to_gradients_and_parameters_is_refused(ranks):
    for released, share, whole, *flat, of_model in ranks.run(wrapped_by_others):
        assert "are in DistributedDataParallel" in released
        assert "remove() the handle" in released
        assert "max_grad_norm=1.0" in share
        assert "ZeroRedundancyOptimizer" in share
        assert all("FullyShardedDataParallel" in limited for limited in flat[::4])
        assert [whole, *flat[1::4]] == ["", "", ""]
        assert ["looks at whole parameters" in parts for parts in flat] == [False, False, True, True] * 2
        assert "Prodigy sums over the whole model" in of_model


def matrices(mesh, name, placement, shapes, options):
    """After 3 steps beside one process's: how far apart, how many elements this rank iterated in the last step, in how
    many collectives.
    """
    iterated = []

    def counted(each, *others):
        iterated.extend(math.prod(m.shape) for m in each)
        return newton_schulz(each, *others)

    starts = [values(shape, i, "cpu") for i, shape in enumerate(shapes)]
    # One is whole on every rank, in a group with the others.
    placed = [Parameter(sharded(x, mesh, [placement])) for x in starts]
    plain = [Parameter(x.clone()) for x in starts]
    placed[0] = Parameter(starts[0].clone())
    opt, twin = (getattr(to, name)([{"params": own, **options}], lr=0.1, backend="eager") for own in (placed, plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "newton_schulz", counted)
        patch.setattr(owners, "LARGEST_ROUND", 64)  # elements: of these matrices three rounds
        for k in range(3):
            gradients = [values(p.shape, 10 * k + i, "cpu") for i, p in enumerate(plain)]
            own = [gradients[0], *(sharded(g, mesh, [placement]) for g in gradients[1:])]
            step(twin, plain, [g.clone() for g in gradients])
            iterated.clear()
            with Watch() as watch:
                step(opt, placed, own)
    wholes = [placed[0], *(p.full_tensor() for p in placed[1:])]
    apart = max((p - q).abs().max().item() for p, q in zip(wholes, plain, strict=True))
    return apart, sum(iterated) - starts[0].numel(), len(watch.collectives)


EXPERTS = {"extra_dims": "batch"}


@pytest.mark.parametrize("name", ["Muon", "NorMuon"])
@pytest.mark.parametrize(
    ("placement", "shapes", "options", "communicates"),
    [
        (Shard(0), [(3, 5), (12, 8), (8, 12), (9, 9), (5, 7), (1, 3)], {}, True),
        (Shard(1), [(3, 5), (12, 8), (7, 12), (9, 9), (1, 7), (3, 1)], {}, True),
        (Shard(0), [(2, 3, 5), (3, 4, 6), (1, 4, 6)], EXPERTS, False),
        (Shard(2), [(2, 3, 5), (3, 4, 6), (1, 4, 6)], EXPERTS, True),
    ],
    ids=["rows", "columns", "experts", "within experts"],
)
def test_sharded_matrices_are_shared_out(name, placement, shapes, options, communicates, ranks):
    (apart, own, collectives), (other_apart, others, _) = ranks.run(matrices, name, placement, shapes, options)
    assert max(apart, other_apart) < 2**-20  # eight roundings of float32, of weights of the size of 1
    assert own + others == sum(math.prod(shape) for shape in shapes[1:])  # each once
    if communicates:
        assert min(own, others) > 0
    # Two a round: there and back. Of experts that lie whole on a rank nothing is sent, unless a norm of each is kept.
    rounds = 3 if options == {} else 1
    assert collectives == (2 * rounds if communicates or name == "NorMuon" else 0)


def summed_or_decomposed(mesh, name, placement, more=()):
    """After 3 steps beside one process's: how far apart, how many elements were sent in the last step, and how many
    matrices each process decomposed.
    """
    shapes = [(40, 30), (40, 30), (3, 20, 10), (1, 9), (7,), ()]
    starts = [values(shape, i, "cpu") for i, shape in enumerate(shapes)]
    kinds = [[placement if len(shape) > 1 else Shard(0) if shape else Replicate()] for shape in shapes]
    placed = [Parameter(sharded(x, mesh, kind)) for x, kind in zip(starts, kinds, strict=True)]
    plain = [Parameter(x.clone()) for x in starts]
    options = {"beta1": 0.9, "weight_decay": 0.1} if name == "AdafactorRelative" else {}
    if name in ("SOAP", "Shampoo"):
        options |= {"max_precond_dim": 30, "precondition_frequency": 2} | dict(more)
    opt, twin = (getattr(to, name)(own, lr=0.1, backend="eager", **options) for own in (placed, plain))
    many = {"own": 0, "twin": 0}
    qr, eigh = torch.linalg.qr, torch.linalg.eigh

    def counting(decompose):
        def counted(x):
            many[whose] += len(x)
            return decompose(x)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "qr", counting(qr))
        patch.setattr(torch.linalg, "eigh", counting(eigh))
        for k in range(3):
            gradients = [values(p.shape, 10 * k + i, "cpu") for i, p in enumerate(plain)]
            whose = "twin"
            step(twin, plain, [g.clone() for g in gradients])
            whose = "own"
            with Watch() as watch:
                step(opt, placed, [sharded(g, mesh, kind) for g, kind in zip(gradients, kinds, strict=True)])
    apart = max((p.full_tensor() - q).abs().max().item() for p, q in zip(placed, plain, strict=True))
    return apart, sum(math.prod(shape) for _, *carried in watch.collectives for shape, _ in carried), many


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["Adafactor", "AdafactorRelative", "CAME"])
def test_rows_and_columns_are_summed_where_they_lie(name, placement, ranks):
    for apart, sent, _ in ranks.run(summed_or_decomposed, name, placement):
        assert apart < 2**-18  # of weights of the size of 4
        # Rows and columns, vectors and norms; of CAME twice. There are 3,017 elements.
        assert sent <= (1 + (name == "CAME")) * (70 + 70 + 3 * 30 + 10 + 7 + 2 * 6)


@pytest.mark.parametrize("name", ["SOAP", "Shampoo"])
def test_ranks_share_decompositions(name, ranks):
    (apart, _, one), (other_apart, _, other) = ranks.run(summed_or_decomposed, name, Shard(0))
    assert apart == other_apart == 0
    # Of four matrices each time two are of one shape, and shared.
    assert one["own"] == other["own"] == one["twin"] * 3 / 4 > 0


def test_ranks_share_the_blocks_of_matrices(ranks):
    for apart, _, many in ranks.run(summed_or_decomposed, "Shampoo", Shard(0), {"block_size": 15}):
        assert apart == 0
        assert 0 < many["own"] < many["twin"] * 3 / 5


def offloaded(mesh, name):
    """Fully sharded, after 3 steps: where the parameters are, and on the host."""
    found = []
    for where in (None, "cpu"):
        net = fully_sharded(mesh)
        opt = getattr(to, name)(net.parameters(), lr=0.05, max_grad_norm=0.1, ema_decay=0.5, offload=where)
        train(net, opt, range(3), mesh.get_local_rank())
        opt.offload_states()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(net, opt, range(3, 5), mesh.get_local_rank())
        found.append(whole(opt, net))
    return found


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Adafactor"])
def test_sharded_parameters_are_stepped_on_the_host(name, ranks):
    for here, there in ranks.run(offloaded, name):
        assert there == here


def disagreeing(mesh):
    """What is said where two ranks would step the same parameters differently, in the first step and when resumed."""
    rank = mesh.get_local_rank()

    def stepped(apart=False, missing=(), **options):
        params = [Parameter(sharded(torch.ones(4, 2), mesh, [Shard(0)])) for _ in range(3)]
        cut = 1 + (apart and rank)
        groups = [{"params": params[:cut]}, {"params": params[cut:], "weight_decay": 0.5}]
        opt = to.AdamW(groups, **options)
        for i, p in enumerate(params):
            p.grad = None if i in missing else sharded(torch.ones(4, 2), mesh, [Shard(0)])
        said = message_of(opt.step)
        assert bool(said) == all(torch.equal(local(p), torch.ones(2, 2)) for p in params)
        return said

    said = [
        stepped(lr=0.1 + rank),
        stepped(max_grad_norm=None if rank else 1.0),
        stepped(state_dtype=torch.float32 if rank else None),
        stepped(missing=[2] * rank, max_grad_norm=1.0),
        stepped(apart=True),
    ]
    return said, [stepped(), stepped(missing=[1], max_grad_norm=1.0), stepped(lr=torch.tensor(0.1))]


def test_ranks_that_disagree_are_told_in_what(ranks):
    for said, agreeing in ranks.run(disagreeing):
        differences = [
            "lr of the group of parameter 0 is 0.1 on rank 0 and 1.1 on rank 1",
            "max_grad_norm is 1.0 on rank 0 and None on rank 1",
            "state_dtype of the group of parameter 0 is not there on rank 0 and torch.float32 on rank 1",
            "the gradient of parameter 2 is there on rank 0 and missing on rank 1",
            "the group of parameter 1 is 1 on rank 0 and 0 on rank 1",
        ]
        for message, difference in zip(said, differences, strict=True):
            assert f"AdamW: the ranks that share its parameters disagree: {difference}. Give all" in message
        assert agreeing == [""] * 3


def released(mesh, replicated):
    """Weights after steps of a trained twin, and with gradients that are released as each layer is reduced; whether
    there were any left after backward.
    """
    rank = mesh.get_local_rank()
    if replicated:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    nets = [fully_sharded(mesh) for _ in range(2)]
    optimizers = [to.AdamW(net.parameters(), lr=0.05, ema_decay=0.5, backend="eager") for net in nets]
    to.enable_gradient_release(optimizers[1])
    left = []
    for net, opt in zip(nets, optimizers, strict=True):
        step = opt.step

        def noted(net=net, step=step):
            left.append(sum(p.grad is not None for p in net.parameters()))
            step()

        opt.step = noted
        train(net, opt, range(4), rank)
        del opt.step
        opt.eval()
    weights = [[p.detach().full_tensor().tolist() for p in net.parameters()] for net in nets]
    return *weights, left, {p.to_local().numel() for p in nets[0].parameters()}


@pytest.mark.parametrize("replicated", [False, True], ids=["sharded", "copies"])
def test_gradients_are_released_once_they_are_reduced(replicated, ranks):
    """On a mesh whose last side is 1 as DistributedDataParallel trains, whose buckets keep all gradients."""
    answers = ranks.run(released, replicated)
    for kept, gone, left, sizes in answers:
        assert gone == kept == answers[0][0]
        assert left == [4] * 4 + [0] * 4
        assert (15 in sizes) == replicated


def page(mesh, name, folder):
    """Run the code of a page of docs/trainers, but for starting and ending the processes, which are here."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL))
    started = re.findall(r"^dist\.(?:init|destroy)_process_group\(.*\)$", code, re.MULTILINE)
    for call in started:
        code = code.replace(call, "pass")
    os.chdir(folder)
    os.environ["LOCAL_RANK"] = str(mesh.get_local_rank())
    found = {}
    exec(compile(code, f"{name}.md", "exec"), found)
    weights = [p.detach() for p in found["model"].parameters()]
    whole = [(p.full_tensor() if isinstance(p, DTensor) else p).tolist() for p in weights]
    return len(started), whole, found["optimizer"].engine.release is not None


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_pages_of_several_processes_run(name, ranks, tmp_path):
    answers = ranks.run(page, name, str(tmp_path))
    for started, weights, released in answers:
        assert (started, released) == (2, name == "ddp")
        assert weights == answers[0][1]
