"""Sharded parameters (DTensor): the kernels run on the local shards, and nothing else changes. What needs
communication: test_two_ranks.py.
"""

import itertools

import pytest
import torch
from conftest import CPP, HAS_TRITON
from launches import replace_launches
from one_step import step_with
from sharding import RANKS, SETTINGS, Watch, array, assert_is_reference, local, own_part, playing, sharded, values
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

import triton_optim as to
from triton_optim.engine.plan import Plan
from triton_optim.precision.random_bits import first_index
from triton_optim.util.layout import parts_of

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
                step_with(opt, params, gradients)
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


@pytest.mark.parametrize(("state_dtype", "nbytes"), [("int8", 2 * (1 + 4 / 256)), ("int4", 2 * (0.5 + 2 / 64))])
@pytest.mark.parametrize("late", [False, True], ids=["sharded first", "sharded later"])
def test_memory_of_codes_of_shards(state_dtype, nbytes, late, device):
    """On 1, 2 and 4 ranks; and as trainers do that set up all and then shard the model."""
    for ranks, placements in ((1, [Replicate(), Replicate()]), (2, [Replicate(), Shard(0)]), (4, [Shard(0), Shard(1)])):
        with playing(RANKS - 1, device, (2, 2)) as mesh:
            p = Parameter(sharded(values((128, 256), 0, device), mesh, placements))
            opt = to.AdamW([Parameter(torch.ones(64, 80)) if late else p], state_dtype=state_dtype, backend="eager")
            opt.param_groups[0]["params"] = [p]
            step_with(opt, [p], [sharded(values((128, 256), 1, device), mesh, placements)])
            held = sum(t.nbytes for name, t in opt.state[p].items() if name != "step")
            assert held == nbytes * 128 * 256 / ranks
            assert held == sum(to.memory_report(opt).states.values())


CODED = {**PLACEMENTS, "strided": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)])}


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
@pytest.mark.parametrize("placed", list(CODED))
def test_shards_have_codes_of_their_own_and_hand_out_their_values(placed, state_dtype, backend, device):
    """A shard is updated as a tensor of its own would be. What is saved is placed as the parameter, and the codes made
    of it are the same.
    """
    shape, placements = CODED[placed]
    with playing(0, device, shape) as mesh:
        make = {"state_dtype": state_dtype, "backend": backend, **SETTINGS}
        p = Parameter(sharded(values((257, 70), 0, device), mesh, placements))
        twin = Parameter(local(p.detach()).clone())
        opt, alone = to.AdamW([p], **make), to.AdamW([twin], **make)
        for k in range(1, 4):
            g = sharded(values((257, 70), k, device), mesh, placements)
            step_with(opt, [p], [g])
            step_with(alone, [twin], [local(g)])
        for name, value in alone.state[twin].items():
            assert torch.equal(opt.state[p][name], value), name
        assert torch.equal(local(p.detach()), twin.detach())
        saved = opt.state_dict()
        for name in ("exp_avg", "exp_avg_sq"):
            value = saved["state"][0][name]
            assert (value.shape, value.dtype, value.placements) == (p.shape, torch.float32, p.placements)
        again = to.AdamW([p], **make)
        again.load_state_dict(saved)
        assert again.state[p].keys() == opt.state[p].keys()
        for name, value in again.state[p].items():
            assert torch.equal(value, opt.state[p][name]), name


def test_empty_shard_counts_its_steps_and_launches_nothing(backend, device, monkeypatch):
    if backend == "triton":
        replace_launches(monkeypatch, lambda *_: pytest.fail("launched for no element"))
    with playing(RANKS - 1, device) as mesh:
        full = values((5, 3), 0, device)
        p = Parameter(sharded(full, mesh, [Shard(0)]))
        opt = to.AdamW([p], backend=backend)
        for _ in range(3):
            step_with(opt, [p], [sharded(full, mesh, [Shard(0)])])
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
        step_with(opt, [p], [sharded(fulls[1], mesh, [Shard(0)], of_gradient)])
        for name in ("exp_avg", "exp_avg_sq"):
            shard = of_state(opt.state[p][name].to_local())
            opt.state[p][name] = DTensor.from_local(
                shard, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride()
            )
        step_with(opt, [p], [sharded(fulls[2], mesh, [Shard(0)], of_gradient)])
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
            step_with(opt, params, [sharded(values((5, 3), 9, device), mesh, [Shard(0)]) for _ in params])
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
        step_with(opt, [p], [g])
        assert_is_reference(opt, [p], [before], [[array(sharded(full, mesh, [Shard(0)]))]])
        assert p.grad is g
        assert torch.equal(g.to_local(), full), "the gradient was written to"


def unequal_ranks(rank, case, backend, device):
    """The collectives that this rank issues in three steps, in which its shards differ from the other ranks'."""
    for dtype in (torch.float32, torch.float64):  # torch.compile refuses to compile under a dispatch mode
        p = Parameter(torch.ones(2, dtype=dtype, device=device))
        step_with(to.AdamW([p], backend=backend), [p], [torch.ones_like(p)])
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
                step_with(opt, params, [sharded(g, mesh, [Partial()]) for g in gradients])
        return watch.collectives


@pytest.mark.parametrize("case", ["alike", "empty", "misaligned", "moved"])
def test_every_rank_sums_partial_gradients_in_the_same_order(case, backend, device):
    """Else ranks wait for each other for ever, or sum what does not belong together. Once each, whatever is planned."""
    ranks = [unequal_ranks(rank, case, backend, device) for rank in range(RANKS)]
    assert len(ranks[0]) == 9, "3 parameters, 3 steps"
    for rank in range(1, RANKS):
        assert ranks[rank] == ranks[0], f"rank {rank}"


# Trap 31: the cost.


def test_no_dtensor_dispatch_in_a_step(backend, device):
    with playing(0, device) as mesh:
        starts = [values((5, i + 1), i, device) for i in range(4)]
        counts = []
        for cls in (lambda p: to.AdamW(p, backend=backend), lambda p: torch.optim.AdamW(p, foreach=True)):
            params = [Parameter(sharded(start, mesh, [Shard(0)])) for start in starts]
            opt = cls(params)
            step_with(opt, params, [sharded(start, mesh, [Shard(0)]) for start in starts])
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
            step_with(opt, params, row)
        assert_is_reference(opt, params, starts, given)
    assert len(plans) == 1


@pytest.mark.parametrize("backend_name", ["eager", "compiled", pytest.param("cpp", marks=CPP)])
def test_shards_are_rounded_with_the_bits_of_the_whole(backend_name, device):
    options = {"param_precision": "stochastic", "state_dtype": torch.bfloat16, "backend": backend_name}
    start, gradient = (values((5, 3), seed, device).to(torch.bfloat16) for seed in (0, 1))
    whole = Parameter(start.clone())
    step_with(to.AdamW([whole], **SETTINGS, **options), [whole], [gradient])
    for rank in range(RANKS):
        with playing(rank, device) as mesh:
            p = Parameter(sharded(start, mesh, [Shard(0)]))
            step_with(to.AdamW([p], **SETTINGS, **options), [p], [sharded(gradient, mesh, [Shard(0)])])
            assert torch.equal(local(p.detach()), own_part(whole.detach(), mesh, [Shard(0)]))


@pytest.mark.parametrize("rank", range(RANKS))
def test_parts_of_parameters_that_tensor_parallel_and_fsdp_cut(rank):
    layers = [torch.nn.Linear(7, 10, bias=False), torch.nn.Linear(10, 7, bias=False)]
    wholes = [layer.weight.detach().clone() for layer in layers]
    with playing(rank, torch.device("cpu"), (2, 2), ("data", "tensor")) as mesh:
        for layer, whole, dim in zip(layers, wholes, (0, 1), strict=True):
            layer.weight = Parameter(distribute_tensor(whole, mesh["tensor"], [Shard(dim)], src_data_rank=None))
            fully_shard(layer, mesh=mesh["data"])
        placements = [layer.weight.placements for layer in layers]
        assert placements == [(_StridedShard(0, split_factor=2), Shard(0)), (Shard(0), Shard(1))]
        for layer, whole in zip(layers, wholes, strict=True):
            (own,), (shape,) = parts_of(layer.weight, [(rank // 2, rank % 2)])
            torch.testing.assert_close(whole[own], layer.weight.to_local(), rtol=0, atol=0)
            assert shape == layer.weight.to_local().shape
            assert all(isinstance(each, slice) for each in own)
        # A stride that no later shard fills: rows 0, 1, 4, 5, 8 and 9, or the others.
        rows = torch.arange(24.0).view(12, 2)
        placed = [Replicate(), _StridedShard(0, split_factor=3)]
        p = DTensor.from_local(torch.empty(6, 2), mesh, placed, run_check=False, shape=(12, 2), stride=(2, 1))
        (own,), (shape,) = parts_of(p, [(rank // 2, rank % 2)])
        assert shape == (6, 2)
        assert rows[own][:, 0].tolist() == [8.0 * k + 4 * (rank % 2) + 2 * j for k in range(3) for j in range(2)]


@pytest.mark.parametrize("placed", ["columns", "rows and columns", "hybrid columns", "strided", "strided columns"])
def test_no_element_has_the_random_bits_of_another(placed, device):
    """Of any placement; replicas have the same."""
    shape, placements = {
        **CODED,
        "hybrid columns": ((2, 2), [Replicate(), Shard(1)]),
        "strided columns": ((2, 2), [_StridedShard(1, split_factor=2), Shard(1)]),
    }[placed]
    taken, start = {}, values((5, 7), 0, device).to(torch.bfloat16)
    for rank in range(RANKS):
        with playing(rank, device, shape) as mesh:
            shard = sharded(start, mesh, placements)
            place = tuple(mesh.get_coordinate()[i] for i, kind in enumerate(placements) if not kind.is_replicate())
            first = first_index(shard)
            taken.setdefault(place, set()).add((first, first + local(shard).numel()))
            if rank == 0:
                p = Parameter(shard)
                opt = to.AdamW([p], **SETTINGS, param_precision="stochastic", backend="eager")
                step_with(opt, [p], [sharded(start, mesh, placements)])
                assert opt.state[p]["step"] == 1
    assert all(len(own) == 1 for own in taken.values())
    spans = sorted(span for own in taken.values() for span in own)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_samples_of_shards_are_refused(device):
    with playing(0, device) as mesh:
        p = Parameter(sharded(values((5, 6), 0, device), mesh, [Shard(0)]))
        with pytest.raises(
            RuntimeError, match=r"parameter 0 is sharded, and slice_p=3 samples whole.*Leave slice_p at 1"
        ):
            to.Prodigy([p], slice_p=3)
        to.Prodigy([p])
