"""Who else has the parameters of an optimizer where several processes train, of which it is not told."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..spec import Update
from ..util.layout import is_flattened


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
    zero = instances("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
    if any(getattr(each, "optim", None) is optimizer for each in zero):
        raise RuntimeError(
            f"{asked} of the parameters that ZeroRedundancyOptimizer gives this process. Leave it None and call "
            "clip_grad_norm_() on the parameters of the whole model before the step."
        )
