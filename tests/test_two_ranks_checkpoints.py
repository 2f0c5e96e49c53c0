"""Checkpoints of sharded parameters: on two processes, and on another number of them."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from resharding import RULES, Job, Kept, changed, outcomes
from sharding import fully_sharded, train, whole
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import triton_optim as to


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
    found = ranks.run(with_other_options, str(tmp_path))
    each = len(CHANGED) + len(LACKING)
    assert [len(own) for own in found] == [3 * each, each]  # the second has what is not sharded
    for own in found:
        assert {name: one for name, one in own.items() if not one.good} == {}
        assert max(one.later for one in own.values()) < 0.02


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
