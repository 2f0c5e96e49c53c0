"""Stochastic rounding: which roles are rounded so, and what their random bits depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels.language import torch_form
from .kernels.rounding import MIXED_BY_ROLE, mix, round_bfloat16, round_float16
from .layout import is_sharded

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer

HALVES = (torch.bfloat16, torch.float16)
PARAM_PRECISIONS = ("storage", "stochastic")

_mix, _round_bfloat16, _round_float16 = map(torch_form, (mix, round_bfloat16, round_float16))


def check_precision(optimizer: RuleOptimizer, group: dict[str, Any]) -> None:
    """Raise ValueError where a group's ``state_dtype`` or ``param_precision`` is none of those there are, RuntimeError
    where its optimizer or its parameters cannot have it.
    """
    name = type(optimizer).__name__
    state_dtype, precision = group.get("state_dtype"), group.get("param_precision", "storage")
    if state_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"Invalid state_dtype: {state_dtype}. Use None (the parameter's), torch.float32 or torch.bfloat16."
        )
    if precision not in PARAM_PRECISIONS:
        raise ValueError(
            f"Invalid param_precision: {precision!r}. Use one of {', '.join(map(repr, PARAM_PRECISIONS))}."
        )
    if state_dtype is not None and optimizer.variant(group).prologue and optimizer.prologue_names:
        raise RuntimeError(
            f"{name}: state_dtype={state_dtype} is for the states of a rule; {optimizer.prologue_names} are what comes "
            "before it keeps, in the parameter's dtype. Leave state_dtype out."
        )
    if state_dtype is not None and any(p.is_complex() for p in group["params"]):
        raise RuntimeError(
            f"{name}: states of complex parameters are complex, not {state_dtype}. Leave state_dtype out."
        )
    if rounds(group) and group.get("differentiable"):
        raise RuntimeError(
            f"{name}: a step that rounds stochastically has no derivative. Leave differentiable out, or "
            'state_dtype=torch.bfloat16 and param_precision="stochastic".'
        )
    if rounds(group) and not optimizer.takes_dense_gradients:
        raise RuntimeError(
            f"{name} does not round stochastically: single rows are updated where they were gathered. Use "
            'state_dtype=torch.float32 or None, and param_precision="storage".'
        )


def rounds(group: dict[str, Any]) -> bool:
    """Whether anything of a group may be rounded stochastically: then its steps are counted."""
    return group.get("state_dtype") == torch.bfloat16 or group.get("param_precision") == "stochastic"


def rounded_roles(group: dict[str, Any], dtypes: tuple[torch.dtype, ...]) -> tuple[bool, ...]:
    """For each result of the rule (p, states), whether it is rounded stochastically; empty where none is.

    Args:
        group: the parameter group.
        dtypes: a role: parameter, gradient, states.
    """
    param = group.get("param_precision") == "stochastic" and dtypes[0] in HALVES
    states = [group.get("state_dtype") == torch.bfloat16 and dtype == torch.bfloat16 for dtype in dtypes[2:]]
    return (param, *states) if param or any(states) else ()


def row_key(seed: int, step: Any, device: torch.device) -> Tensor:
    """A hash of seed and step, 0-dim int32. A step on a device stays there."""
    # Filled there, not copied: that would be waited for, and could not be captured.
    halves = [torch.full((), _signed(part), dtype=torch.int32, device=device) for part in (seed, seed >> 32)]
    hashed = _mix(_mix(halves[0]) + halves[1])
    count = step.to(device, torch.int32) if isinstance(step, Tensor) else _signed(step)
    key: Tensor = _mix(hashed + count)
    return key


def tensor_keys(rows: Tensor, numbers: Tensor, first: Tensor) -> Tensor:
    """What the kernels take, int64 ``(tensors, 2)``.

    Args:
        rows: int32, the key of each tensor's row.
        numbers: int32, each parameter's place among the optimizer's.
        first: int64, the index of each tensor's first element in the whole parameter.
    """
    return torch.stack((_mix(rows + numbers).long(), first), dim=1)


def first_index(p: Tensor) -> int:
    """The index of the first element of this process's shard in the whole parameter, which is cut along its rows."""
    if not is_sharded(p):
        return 0
    from torch.distributed.tensor import Replicate, Shard

    own: Any = p
    known = (isinstance(kind, Replicate) or (type(kind) is Shard and kind.dim == 0) for kind in own.placements)
    if not all(known):
        raise RuntimeError(
            f"stochastic rounding of a parameter placed {own.placements}: only shards of whole rows (Shard(0)) have "
            'the random bits of the whole. Use state_dtype=None and param_precision="storage" for it.'
        )
    first, rows = 0, own.shape[0] if own.dim() else 1
    for dim, placement in enumerate(own.placements):
        if isinstance(placement, Shard):
            each = -(-rows // own.device_mesh.size(dim))  # as torch.chunk
            before = min(each * own.device_mesh.get_local_rank(dim), rows)
            first, rows = first + before, min(each, rows - before)
    return first * (own.numel() // max(own.shape[0], 1) if own.dim() else 1)


def rounding(
    roles: tuple[bool, ...], key: Tensor, index: Tensor, dtypes: tuple[torch.dtype, ...]
) -> Callable[[int, Tensor], Tensor] | None:
    """What `apply` takes as ``rounded``, or None where nothing is rounded.

    Args:
        roles: see :func:`rounded_roles`.
        key: int64 ``(2,)``, a row of :func:`tensor_keys`.
        index: int64, the number of each element in the tensor's memory.
        dtypes: a role: parameter, gradient, states.
    """
    if not roles:
        return None
    place = index + key[1]
    mixed = _mix(_mix(_low(place)) + _low(place >> 32)) + _low(key[0])

    def rounded(result: int, value: Tensor) -> Tensor:
        if not roles[result]:
            return value
        bits = _mix(mixed + result * MIXED_BY_ROLE)
        kept = (dtypes[0], *dtypes[2:])[result]
        form = _round_bfloat16 if kept == torch.bfloat16 else _round_float16
        exact: Tensor = form(value.to(torch.float32), bits)
        return exact

    return rounded


def _low(x: Tensor) -> Tensor:
    """The lower 32 bits of int64."""
    return ((x << 32) >> 32).to(torch.int32)


def _signed(x: int) -> int:
    """The lower 32 bits of an int, as a signed one."""
    return (x + 2**31) % 2**32 - 2**31
