"""Sharded parameters that need communication: training on two processes over gloo."""

import inspect
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from one_step import step_with
from sharding import fully_sharded, network, sharded, train, whole
from table import CASES, KINDS, rows, rows_and_backends
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

import triton_optim as to
from triton_optim.kernels.language import jit


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
            step_with(opt, [p], [g])
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
