"""The step as torch.compile sees it: one operator that mutates the parameters.

Dynamo traces nothing of a step but the list of parameters and gradients. Hyperparameters, schedules, step counts and
states stay behind the operator, so no change of theirs can recompile, and there is no graph break.
"""

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer

_live: "weakref.WeakValueDictionary[int, RuleOptimizer]" = weakref.WeakValueDictionary()
_handles = itertools.count()

# A replayed CUDA graph would repeat this step's scalars for ever: Inductor must leave the operator out of its graphs.
_tags = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def register(optimizer: "RuleOptimizer") -> int:
    """A number by which the operator finds `optimizer` again, as long as it lives."""
    handle = next(_handles)
    _live[handle] = optimizer
    return handle


@torch.library.custom_op("triton_optim::step", mutates_args=("params",), tags=_tags)
def step(params: list[Tensor], gradients: list[Tensor], indices: list[int], handle: int) -> None:
    """Step the optimizer `handle`; ``gradients[k]`` belongs to its parameter number ``indices[k]``."""
    optimizer = _live[handle]
    present: list[Tensor | None] = [None] * len(optimizer._flat)
    for i, g in zip(indices, gradients, strict=True):
        present[i] = g
    # A compiler that cannot prove the mutation safe passes copies, and keeps the parameters for later readers.
    pairs = [(optimizer._flat[i], p) for i, p in zip(indices, params, strict=True)]
    copies = [(own, p) for own, p in pairs if own.data_ptr() != p.data_ptr()]
    kept = [own.detach().clone() for own, _ in copies]
    with torch.no_grad():
        for own, p in copies:
            own.copy_(p)
        optimizer.update(present)
        for (own, p), before in zip(copies, kept, strict=True):
            p.copy_(own)
            own.copy_(before)


@step.register_fake
def _(params: list[Tensor], gradients: list[Tensor], indices: list[int], handle: int) -> None:
    return None


def traced_step(optimizer: "RuleOptimizer") -> None:
    """What Dynamo traces in place of a step."""
    # `_flat`, not the groups: reading a group would guard on its learning rate.
    flat = optimizer._flat
    indices = [i for i in range(len(flat)) if flat[i].grad is not None]
    if indices:
        with torch.no_grad():
            torch.ops.triton_optim.step(
                [flat[i] for i in indices], [flat[i].grad for i in indices], indices, optimizer._handle
            )
