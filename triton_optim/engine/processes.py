"""Who else has the parameters of an optimizer where several processes train, of which it is not told."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..spec import Update
from ..util.layout import is_flattened, is_sharded


def in_process_group() -> bool:
    """Whether this process is in a process group, perhaps alone."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def several() -> bool:
    """Whether this process is one of several that train together."""
    return in_process_group() and torch.distributed.get_world_size() > 1


def instances(module: str, name: str) -> Iterator[Any]:
    """The objects of a class that there are, if its module was imported. It takes a tenth of a second."""
    kind = getattr(sys.modules.get(module), name, None)
    if kind is not None:
        yield from (each for each in gc.get_objects() if issubclass(type(each), kind))


def check_reduced_before(name: str, params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where gradients that are released as they arrive would be those of one process alone."""
    if not several():
        return
    own = set(map(id, params))
    for wrapped in instances("torch.nn.parallel.distributed", "DistributedDataParallel"):
        if any(id(p) in own for p in wrapped.parameters()):
            raise RuntimeError(
                f"{name}: its parameters are in DistributedDataParallel, which averages gradients over the processes "
                "after they arrive: released at once, those of each process would go their own way. remove() the "
                "handle of gradient release, or train with fully_shard."
            )


def check_norm_is_whole(optimizer: Update, params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where the norm of the gradients that an optimizer sees is that of this process's share."""
    if not several():
        return
    asked = f"{type(optimizer).__name__}: max_grad_norm={optimizer.max_grad_norm} would limit the norm of the gradients"
    if any(map(is_flattened, params)):
        raise RuntimeError(
            f"{asked} that this process keeps of a FullyShardedDataParallel. Leave it None and call the module's "
            "clip_grad_norm_() before the step, or use fully_shard, whose parameters say how they are sharded."
        )
    if is_in_zero(optimizer):
        raise RuntimeError(
            f"{asked} of the parameters that ZeroRedundancyOptimizer gives this process. Leave it None and call "
            "clip_grad_norm_() on the parameters of the whole model before the step."
        )


def is_in_zero(optimizer: Update) -> bool:
    """Whether ZeroRedundancyOptimizer made an optimizer, of some of the parameters."""
    every = instances("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
    return any(getattr(each, "optim", None) is optimizer for each in every)


def check_seen_whole(optimizer: Update, params: list[Tensor]) -> None:
    """Raise RuntimeError where what comes before a rule would see a share of a parameter, or of the model, for all.

    Args:
        params: those that something comes before the rule of.
    """
    if not params or not several():
        return
    name = type(optimizer).__name__
    if any(map(is_flattened, params)):
        raise RuntimeError(
            f"{name} looks at whole parameters, and FullyShardedDataParallel gives this process flat parts of them. "
            "Use fully_shard, whose parameters say how they are sharded."
        )
    if type(optimizer).total is not Update.total and is_in_zero(optimizer):
        raise RuntimeError(
            f"{name} sums over the whole model, and ZeroRedundancyOptimizer gives this process some of its parameters. "
            "Use fully_shard, or the optimizer by itself."
        )


class Agreement:
    """Whether the ranks that share an optimizer's parameters step them alike: compared once for parameters, before
    their first step. Later plans may be made by one rank alone, which nobody would answer.
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []  # of which it is known

    def check(self, optimizer: Update, params: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """See :func:`check_ranks_agree`."""
        if len(self._params) != len(params) or not all(map(is_, self._params, params)):
            self._params = params
            check_ranks_agree(optimizer, params, gradients)


def check_ranks_agree(optimizer: Update, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError where ranks would not step the parameters alike that are sharded over them: their parts would
    be updated in different ways, or one rank would wait for ever for another.

    It communicates: every rank of a mesh must ask at the same time. All of them raise.

    Args:
        params: all of the optimizer's.
        gradients: one of each, None where there is none.
    """
    if not several() or torch.distributed.get_backend() == "fake":  # which sends nothing
        return
    meshes: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if is_sharded(p):
            meshes.setdefault(p.device_mesh, []).append(i)  # type: ignore[attr-defined]
    problem = None
    for mesh, own in meshes.items():
        said = what_is_stepped(optimizer, params, gradients, own)
        for dim in range(mesh.ndim if mesh.get_coordinate() is not None else 0):
            group = mesh.get_group(dim)
            every: list[Any] = [None] * torch.distributed.get_world_size(group)
            # Those who know of a problem go on until all of the mesh know.
            torch.distributed.all_gather_object(every, (said, problem), group=group)
            ranks = torch.distributed.get_process_group_ranks(group)
            found = [known for _, known in every]
            for (other, _), rank in zip(every, ranks, strict=True):
                found.append(difference(every[0][0], other, ranks[0], rank))
            problem = next(filter(None, found), None)
    if problem is not None:
        raise RuntimeError(
            f"{type(optimizer).__name__}: the ranks that share its parameters disagree: {problem}. Give all the same "
            "groups and options, and gradients to the same parameters."
        )


def what_is_stepped(
    optimizer: Update, params: Sequence[Tensor], gradients: Sequence[Tensor | None], own: Sequence[int]
) -> dict[str, Any]:
    """By what it is called, all that ranks must have in common of some of the parameters."""
    said: dict[str, Any] = {
        "the optimizer": type(optimizer).__name__,
        "max_grad_norm": optimizer.max_grad_norm,
        "amp": optimizer.amp,
        "the number of parameters": len(own),
    }
    groups = [number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    for position, i in enumerate(own):
        said[f"the shape of parameter {position}"] = tuple(params[i].shape)
        said[f"the dtype of parameter {position}"] = str(params[i].dtype)
        said[f"the group of parameter {position}"] = groups[i] - groups[own[0]]  # what others have before may differ
        said[f"the gradient of parameter {position}"] = "there" if gradients[i] is not None else "missing"
    first = {groups[i]: position for position, i in reversed(list(enumerate(own)))}
    for number, position in sorted(first.items()):
        for name, value in optimizer.param_groups[number].items():
            if name not in ("params", "param_names"):
                said[f"{name} of the group of parameter {position}"] = comparable(value)
    return said


def comparable(value: Any) -> str:
    """A hyperparameter as two processes can compare it, without waiting for a device."""
    if isinstance(value, Tensor):
        return repr(value.item()) if value.device.type == "cpu" and value.numel() == 1 else "a tensor"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(comparable, value))})"
    known = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
    return repr(value) if known else f"a {type(value).__name__}"


def difference(ours: dict[str, Any], theirs: dict[str, Any], our_rank: int, their_rank: int) -> str | None:
    """The first in which two ranks differ, in words; None where they agree."""
    for name in {**ours, **theirs}:
        a, b = (own.get(name, "not there") for own in (ours, theirs))
        if a != b:
            return f"{name} is {a} on rank {our_rank} and {b} on rank {their_rank}"
    return None
