"""Checkpoints of sharded training by torch.distributed.checkpoint, saved on so many ranks and loaded on so many others:
test_two_ranks_checkpoints.py takes some cases of these, benchmarks/dcp_matrix.py all.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from table import CASES, Case
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, async_save, load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Module, Parameter

BF16, F32 = torch.bfloat16, torch.float32
# Cut unevenly. On four ranks all shards of the first but the last have the 4,096 elements that codes take, of the
# second none, on fewer ranks all; of the others, ranks may have nothing at all.
SHAPES = ((257, 64), (130, 64), (5, 3), (1, 40), (40,))
# How far a code may be from its value, as a share of the largest of its block: half the step between the largest two,
# which is rounded itself, and int4's scales to bfloat16.
ROUNDING = {"int8": 1.0001 * 192 / 16192 / 2, "int4": 1.01 * 12 / 52 / 2}
STATES: dict[str, Any] = {"states as parameters": None, "fp32 states": F32, "bf16 states": BF16} | {
    f"{name} states": name for name in ("int8", "int4")
}
PRECISIONS = ("storage", "stochastic", "kahan", "split24", "split32", "master")
RULES = {case.name: case for case in CASES if not case.sparse}


class Kept(NamedTuple):
    """How an optimizer keeps what it keeps."""

    states: Any
    precision: str
    averages: bool

    @property
    def dtype(self) -> torch.dtype:
        return F32 if self.precision == "float32" else BF16

    def options(self) -> dict[str, Any]:
        own: dict[str, Any] = {} if self.states is None else {"state_dtype": self.states}
        own |= {"ema_decay": 0.9} if self.averages else {}
        return own if self.precision == "float32" else own | {"param_precision": self.precision}

    def __str__(self) -> str:
        states = next(name for name, value in STATES.items() if value == self.states)
        words = ["fp32" if self.precision == "float32" else f"bf16 {self.precision}", states]
        return ", ".join(words + ["averages"] * self.averages)


EVERY = [Kept(*own) for own in product(STATES.values(), ("float32", *PRECISIONS), (False, True))]
# Without any option, and with all of them together.
SOME = [
    Kept(None, "float32", False),
    Kept("int8", "split32", True),
    Kept("int4", "split24", True),
    Kept(BF16, "stochastic", True),
]


class Sharded(Module):
    """Parameters, cut along their rows, or whole without a mesh, and nothing else: gradients are given."""

    def __init__(self, case: Case, dtype: torch.dtype, mesh: DeviceMesh | None, seed: int = 0) -> None:
        super().__init__()
        self.mesh, self.placements = mesh, [Shard(0)]
        self.shapes = [shape for shape in SHAPES if len(shape) == 2 or not case.matrices]
        random = torch.Generator().manual_seed(seed)
        for i, shape in enumerate(self.shapes):
            self.register_parameter(f"p{i}", Parameter(self.place(torch.randn(shape, generator=random).to(dtype))))

    def place(self, whole: Tensor) -> Tensor:
        return whole if self.mesh is None else distribute_tensor(whole, self.mesh, self.placements, src_data_rank=None)

    def train_on(self, optimizer: Any, steps: range) -> None:
        for step in steps:
            random = torch.Generator().manual_seed(100 + step)
            for p in self.parameters():
                p.grad = self.place(torch.randn(p.shape, generator=random).to(p.dtype))
            optimizer.step()
        optimizer.zero_grad()


class Job(NamedTuple):
    """An optimizer, and how it keeps what it keeps."""

    case: Case
    kept: Kept

    def made(self, mesh: DeviceMesh | None, seed: int = 0) -> tuple[Sharded, Any]:
        model = Sharded(self.case, self.kept.dtype, mesh, seed)
        options = self.case.settings | self.kept.options()
        return model, self.case.ours(model.parameters(), **options, backend="eager")

    def refusal(self) -> str:
        """What it says where it cannot be had."""
        try:
            model, optimizer = self.made(None)
            model.train_on(optimizer, range(1))
        except RuntimeError as error:
            return str(error)
        return ""


def contents(made: dict[str, tuple[Sharded, Any]], mesh: DeviceMesh | None) -> dict[str, dict[str, Tensor]]:
    """Every value that training goes on from, whole, by job; of a mesh the first rank has them, the others nothing."""
    own: dict[str, dict[str, Tensor]] = {}
    for job, (model, optimizer) in made.items():
        own[job] = {name: p.detach() for name, p in model.named_parameters()}
        for i, state in optimizer.state_dict()["state"].items():
            own[job] |= {f"{name} of {i}": value for name, value in state.items() if isinstance(value, Tensor)}
    if mesh is None:
        return {job: {name: value.clone() for name, value in values.items()} for job, values in own.items()}
    here = {
        job: {name: packed(getattr(t, "_local_tensor", t)) for name, t in values.items()} for job, values in own.items()
    }
    ranks: list[Any] = [None] * mesh.size()
    dist.gather_object(here, ranks if mesh.get_local_rank() == 0 else None, group=mesh.get_group(), group_dst=0)
    if mesh.get_local_rank():
        return {}
    return {
        job: {
            name: joined([rank[job][name] for rank in (ranks if hasattr(t, "full_tensor") else ranks[:1])])
            for name, t in values.items()
        }
        for job, values in own.items()
    }


def packed(t: Tensor) -> tuple[torch.dtype, torch.Size, Any]:
    """Its bytes as NumPy's, which are pickled many times as fast."""
    return t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy()


def joined(shards: list[tuple[torch.dtype, torch.Size, Any]]) -> Tensor:
    assert len({dtype for dtype, *_ in shards}) == 1, "the ranks keep it in different dtypes"
    own = [torch.from_numpy(data).view(dtype).reshape(shape) for dtype, shape, data in shards]
    return torch.cat(own) if own[1:] else own[0]


class Trained(NamedTuple):
    """What there was at a checkpoint, and what training came to that went on from it; by job, at the first rank."""

    values: dict[str, dict[str, Tensor]]
    later: dict[str, dict[str, Tensor]]


def checkpoint_of(made: dict[str, tuple[Sharded, Any]], how: str) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
    return {job: list(get_state_dict(*both, options=options)) for job, both in made.items()}


def train_on(made: dict[str, tuple[Sharded, Any]], steps: range) -> None:
    for model, optimizer in made.values():
        model.train_on(optimizer, steps)


def group_of(mesh: DeviceMesh | None) -> Any:
    return None if mesh is None else mesh.get_group()


def saved(jobs: dict[str, Job], mesh: DeviceMesh | None, folder: Path, how: str) -> Trained:
    """Train two steps, save all into one checkpoint, and train two more, meanwhile where `how` is "async"."""
    made = {name: job.made(mesh) for name, job in jobs.items()}
    train_on(made, range(2))
    values = contents(made, mesh)
    if how == "async":
        pending: Any = async_save(checkpoint_of(made, how), checkpoint_id=folder, process_group=group_of(mesh))
    else:
        save(checkpoint_of(made, how), checkpoint_id=folder, process_group=group_of(mesh))
    train_on(made, range(2, 4))
    if how == "async":
        pending.result()  # now: what follows communicates in the same group
    return Trained(values, contents(made, mesh))


def loaded(jobs: dict[str, Job], mesh: DeviceMesh | None, folder: Path, how: str, partial: bool = False) -> Trained:
    """Load it into other models and new optimizers, and train these for the last two steps.

    Args:
        partial: whether what the checkpoint lacks is left as it is.
    """
    made = {name: job.made(mesh, seed=7) for name, job in jobs.items()}
    state = checkpoint_of(made, how)
    planner = DefaultLoadPlanner(allow_partial_load=partial)
    load(state, checkpoint_id=folder, process_group=group_of(mesh), planner=planner)
    options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
    for name, both in made.items():
        model, optimizer = state[name]
        set_state_dict(*both, model_state_dict=model, optim_state_dict=optimizer, options=options)
    values = contents(made, mesh)
    train_on(made, range(2, 4))
    return Trained(values, contents(made, mesh))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """How far values are apart at most, as a share of the largest of each tensor; inf where they are others.

    In float32: of what is float64, numbers of the whole model that each rank sums up, ranks differ in the last bit.
    """
    if one.keys() != other.keys():
        return math.inf
    worst = 0.0
    for name, value in one.items():
        a, b = value.float(), other[name].float()
        if not torch.equal(a, b):
            worst = max(worst, ((a - b).abs().max() / a.abs().max()).nan_to_num(math.inf).item())
    return worst


class Outcome(NamedTuple):
    """What came of a checkpoint.

    Attributes:
        values: how far what was loaded is from what was saved.
        later: how far what training came to is from where it would have come to without.
        allowed: what `values` may be: where the shards or codes are others a rounding of these, of what is no code
            nothing.
        as_many: whether the ranks are as many, and the options the same: then `later` may be nothing, too.
    """

    values: float
    later: float
    allowed: float
    as_many: bool

    @property
    def good(self) -> bool:
        return self.values <= self.allowed and (not self.as_many or self.later == 0)


def outcomes(
    jobs: dict[str, Job], meshes: dict[int, DeviceMesh], folder: Path, pairs: list[tuple[int, int]], how: str
) -> dict[tuple[str, int, int], Outcome]:
    """What comes of every job and pair of numbers of ranks. All ranks of the largest mesh call it; the first has all of
    it.

    Args:
        meshes: by how many ranks they have.
        pairs: saved on so many, loaded on so many.
    """
    found = {}
    for n in meshes:
        own = [k for saving, k in pairs if saving == n]
        checkpoint = folder / f"{n}"
        before = saved(jobs, meshes[n], checkpoint, how) if own and meshes[n].get_coordinate() else None
        dist.barrier()
        for k in own:
            after = loaded(jobs, meshes[k], checkpoint, how) if meshes[k].get_coordinate() else None
            for name, job in jobs.items() if before and after and before.values else ():
                far = [apart(x[name], y[name]) for x, y in zip(before, after, strict=True)]
                allowed = 0.0 if n == k else ROUNDING.get(job.kept.states, 0.0)
                found[name, n, k] = Outcome(*far, allowed, n == k)
            dist.barrier()
    return found


def changed(
    jobs: dict[str, tuple[Job, Job]], mesh: DeviceMesh | None, folder: Path, how: str, partial: bool
) -> dict[str, Outcome]:
    """What comes of checkpoints that are loaded with other options than they were saved with: of what both have, and
    later of the parameters. Of a mesh the first rank has it.
    """
    before = saved({name: job for name, (job, _) in jobs.items()}, mesh, folder, how)
    dist.barrier()
    after = loaded({name: job for name, (_, job) in jobs.items()}, mesh, folder, how, partial)
    dist.barrier()
    found = {}
    for name, (_, job) in jobs.items() if before.values else ():
        both = before.values[name].keys() & after.values[name].keys()
        params = [part for part in both if " of " not in part]
        values = apart(*({part: x.values[name][part] for part in both} for x in (before, after)))
        later = apart(*({part: x.later[name][part] for part in params} for x in (before, after)))
        found[name] = Outcome(values, later, ROUNDING.get(job.kept.states, 0.0), False)
    return found
