"""Checkpoints of sharded training by torch.distributed.checkpoint, saved on so many ranks and loaded on so many others:
test_two_ranks.py takes some cases of these, benchmarks/dcp_matrix.py all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
# What the codes of an item may be apart from the value, as a share of the largest of its block: half the step between
# the largest two, and int4's scales are rounded to bfloat16.
ROUNDING = {"int8": 192 / 16192 / 2, "int4": 12 / 52 / 2}
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
# Each option by itself, and all together.
SOME = [own for own in EVERY if (own.states is not None) + (own.precision != "float32") + own.averages <= 1]
SOME += [Kept("int8", "split32", True), Kept("int4", "split24", True), Kept(BF16, "stochastic", True)]


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


def made(case: Case, kept: Kept, mesh: DeviceMesh | None, seed: int = 0) -> tuple[Sharded, Any]:
    model = Sharded(case, kept.dtype, mesh, seed)
    return model, case.ours(model.parameters(), **(case.settings | kept.options()), backend="eager")


def whole(t: Tensor) -> Tensor:
    return t.detach().full_tensor().clone() if hasattr(t, "full_tensor") else t.detach().clone()


def contents(model: Sharded, optimizer: Any) -> dict[str, Tensor]:
    """Every value that training goes on from, whole."""
    found = {name: whole(p) for name, p in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{name} of {i}": whole(value) for name, value in state.items() if isinstance(value, Tensor)}
    return found


class Trained(NamedTuple):
    """What there was at a checkpoint, and what training came to that went on from it."""

    values: dict[str, Tensor]
    later: dict[str, Tensor]


def group_of(mesh: DeviceMesh | None) -> Any:
    return None if mesh is None else mesh.get_group()


def saved(case: Case, kept: Kept, mesh: DeviceMesh | None, folder: Path, how: str) -> Trained:
    """Train two steps, save, and train two more, meanwhile where `how` is "async"."""
    model, optimizer = made(case, kept, mesh)
    model.train_on(optimizer, range(2))
    values = contents(model, optimizer)
    parts = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=how == "flat"))
    state = dict(zip(("model", "optimizer"), parts, strict=True))
    if how == "async":
        pending: Any = async_save(state, checkpoint_id=folder, process_group=group_of(mesh))
    else:
        save(state, checkpoint_id=folder, process_group=group_of(mesh))
    model.train_on(optimizer, range(2, 4))
    if how == "async":
        pending.result()  # now: what follows communicates in the same group
    return Trained(values, contents(model, optimizer))


def loaded(case: Case, kept: Kept, mesh: DeviceMesh | None, folder: Path, how: str, partial: bool = False) -> Trained:
    """Load it into another model and a new optimizer, and train these for the last two steps.

    Args:
        partial: whether what the checkpoint lacks is left as it is.
    """
    model, optimizer = made(case, kept, mesh, seed=7)
    options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
    parts = get_state_dict(model, optimizer, options=options)
    state = dict(zip(("model", "optimizer"), parts, strict=True))
    planner = DefaultLoadPlanner(allow_partial_load=partial)
    load(state, checkpoint_id=folder, process_group=group_of(mesh), planner=planner)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    values = contents(model, optimizer)
    model.train_on(optimizer, range(2, 4))
    return Trained(values, contents(model, optimizer))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """How far values are apart at most, as a share of the largest of each tensor; inf where they are others."""
    if one.keys() != other.keys():
        return math.inf
    worst = 0.0
    for name, value in one.items():
        a, b = value.double(), other[name].double()
        if not torch.equal(a, b):
            worst = max(worst, ((a - b).abs().max() / a.abs().max()).nan_to_num(math.inf).item())
    return worst


def rounding(kept: Kept) -> float:
    """What :func:`apart` may be where the shards are others: of what is no code, nothing."""
    return ROUNDING.get(kept.states, 0.0) * 1.01


class Outcome(NamedTuple):
    """What came of a checkpoint.

    Attributes:
        values: how far what was loaded is from what was saved.
        later: how far what training came to is from where it would have come to without.
        allowed: what `values` may be.
        as_many: whether the ranks are as many: then `later` may be nothing, too.
    """

    values: float
    later: float
    allowed: float
    as_many: bool

    @property
    def good(self) -> bool:
        return self.values <= self.allowed and (not self.as_many or self.later == 0)


def outcomes(
    case: Case, kept: Kept, meshes: dict[int, DeviceMesh], folder: Path, pairs: Iterable[tuple[int, int]], how: str
) -> dict[tuple[int, int], Outcome]:
    """What comes of every pair of numbers of ranks. All ranks of the largest mesh call it; the first has all of it.

    Args:
        meshes: by how many ranks they have.
        pairs: saved on so many, loaded on so many.
    """
    found = {}
    for n in meshes:
        own = [k for saving, k in pairs if saving == n]
        checkpoint = folder / f"{n}"
        before = saved(case, kept, meshes[n], checkpoint, how) if own and meshes[n].get_coordinate() else None
        dist.barrier()
        for k in own:
            if meshes[k].get_coordinate():
                after = loaded(case, kept, meshes[k], checkpoint, how)
                if before is not None:
                    far = [apart(*two) for two in zip(before, after, strict=True)]
                    found[n, k] = Outcome(far[0], far[1], 0.0 if n == k else rounding(kept), n == k)
            dist.barrier()
    return found


def changed(
    case: Case, kept: tuple[Kept, Kept], mesh: DeviceMesh | None, folder: Path, how: str, partial: bool
) -> Outcome:
    """What comes of a checkpoint that is loaded with other options than it was saved with: of what both have, and
    later of the parameters.
    """
    before = saved(case, kept[0], mesh, folder, how)
    dist.barrier()
    after = loaded(case, kept[1], mesh, folder, how, partial)
    dist.barrier()
    both = before.values.keys() & after.values.keys()
    params = [name for name in both if " of " not in name]
    values = apart({name: before.values[name] for name in both}, {name: after.values[name] for name in both})
    later = apart({name: before.later[name] for name in params}, {name: after.later[name] for name in params})
    return Outcome(values, later, rounding(kept[1]), False)
