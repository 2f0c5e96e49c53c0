"""The step as torch.compile sees it: one operator that mutates the parameters.

Dynamo traces nothing of a step but the list of parameters and gradients. Hyperparameters, schedules, step counts and
states stay behind the operator, so no change of theirs can recompile, and there is no graph break.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..spec import Update


class Steps(Protocol):
    """What runs steps: an engine."""

    name: str  # of the optimizer
    handle: int
    params: list[Tensor]
    release: Any

    def take_params(self) -> None:
        """Take note of the parameters that there are."""

    def step(self, given: list[Tensor | None] | None = None) -> None:
        """Run a step; `given` are the gradients, left out those that the parameters have."""


_live: "weakref.WeakValueDictionary[int, Steps]" = weakref.WeakValueDictionary()
_handles = itertools.count()

# A replayed CUDA graph would repeat this step's scalars for ever: Inductor must leave the operator out of its graphs.
_tags = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def register(engine: Steps) -> int:
    """A number by which the operator finds `engine` again, as long as it lives."""
    handle = next(_handles)
    _live[handle] = engine
    return handle


@torch.library.custom_op("triton_optim::step", mutates_args=("params",), tags=_tags)
def step(params: list[Tensor], gradients: list[Tensor], indices: list[int], count: int, handle: int) -> None:
    """Step the engine `handle`; ``gradients[k]`` belongs to number ``indices[k]`` of its `count` parameters."""
    engine = _live[handle]
    engine.take_params()
    own = engine.params
    if len(own) != count:
        raise RuntimeError(
            f"{engine.name} has {len(own)} parameters, and had {count} where its step was traced. Change "
            "param_groups outside of the compiled function, or leave the change and the step uncompiled."
        )
    present: list[Tensor | None] = [None] * count
    for i, g in zip(indices, gradients, strict=True):
        present[i] = g
    # A compiler that cannot prove the mutation safe passes copies, and keeps the parameters for later readers.
    pairs = [(own[i], p) for i, p in zip(indices, params, strict=True)]
    copies = [(real, p) for real, p in pairs if real.data_ptr() != p.data_ptr()]
    kept = [real.detach().clone() for real, _ in copies]
    with torch.no_grad():
        for real, p in copies:
            real.copy_(p)
        engine.step(present)
        for (real, p), before in zip(copies, kept, strict=True):
            p.copy_(real)
            real.copy_(before)


@step.register_fake
def _(params: list[Tensor], gradients: list[Tensor], indices: list[int], count: int, handle: int) -> None:
    return None


def groups_of(optimizer: "Update") -> list[dict[str, Any]]:
    """The parameter groups, for what Dynamo traces: it guards on what is read of them. Of ``param_groups`` as an
    attribute it would read all, learning rates among it.
    """
    groups: list[dict[str, Any]] = optimizer.__dict__["param_groups"]
    return groups


@_disable_dynamo  # torch.compiler.disable would import Dynamo, which takes longer than all else here
def step_outside_the_graph(engine: Steps) -> None:
    """A step that breaks the graph."""
    engine.step()


def traced_step(engine: Steps, groups: list[dict[str, Any]]) -> None:
    """What Dynamo traces in place of a step; `groups` of :func:`groups_of`."""
    params = [p for group in groups for p in group["params"]]
    # The operator would be called for each of the tensors that a wrapper holds; and Inductor compiles no operator that
    # writes complex tensors.
    if any(p.is_complex() or hasattr(type(p), "__tensor_flatten__") for p in params):
        step_outside_the_graph(engine)
        return
    indices = [i for i in range(len(params)) if params[i].grad is not None]
    if indices or engine.release is not None:
        with torch.no_grad():
            torch.ops.triton_optim.step(
                [params[i] for i in indices],
                [params[i].grad for i in indices],
                indices,
                len(params),
                engine.handle,
            )
