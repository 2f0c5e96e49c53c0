"""What becomes of an optimizer's states when they are saved and loaded."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .codecs import AVERAGE, CORRECTIONS, COUNT, PRECISION, SCALE, held_codec
from .prologue import check_states
from .rows import counted_dtype

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer


# What a group has only where it was asked for.
OPTIONAL = (*PRECISION, "seed", "ema_decay", "ema_warmup")


def check_state_dict(optimizer: RuleOptimizer, state_dict: dict[str, Any]) -> None:
    """Raise what :meth:`RuleOptimizer.load_state_dict` says of a state dict that does not fit."""
    counted = {"step", *chain.from_iterable(map(optimizer.counted_names, optimizer.param_groups))}
    elementwise = {AVERAGE, *(name for variant in optimizer.variants for name in variant.state_names)}
    known = counted | elementwise | {*optimizer.prologue_names}
    parts = {*CORRECTIONS, AVERAGE, COUNT, *(f"{name}_{SCALE}" for name in elementwise)}
    for number, group in enumerate(state_dict["param_groups"]):
        # An option may be newer than the checkpoint; a hyperparameter can't be.
        numbers = {name for name, value in optimizer.defaults.items() if not isinstance(value, (bool, type(None)))}
        needed = sorted(numbers - {*OPTIONAL})
        if missing := [name for name in needed if name not in group]:
            raise KeyError(
                f"group {number} of the state dict holds {sorted(group)} and lacks {missing}: it is not one of "
                f"{type(optimizer).__name__}'s. Load it into the optimizer that saved it."
            )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    for i, p in zip(indices, params, strict=False):
        state = state_dict["state"].get(i, {})
        # Names that optimizers share, such as step, prove nothing where others are in place of ours.
        complete = any(state.keys() >= {*variant.state_names} for variant in optimizer.variants)
        if state and (not (known | parts) & state.keys() or (state.keys() - known - parts and not complete)):
            raise ValueError(
                f"the state of parameter {i} holds {sorted(state)}, {type(optimizer).__name__} keeps {sorted(known)}: "
                "this state dict is of another optimizer. Load it into that one."
            )
        if optimizer.prologue_names:
            check_states(optimizer, group_of(optimizer, p), i, p, state)
        for name, value in state.items():
            if f"{name}_{SCALE}" in state:
                check_codes(optimizer, state, name, i, p)
            elif (name in elementwise or name in CORRECTIONS) and isinstance(value, Tensor) and value.shape != p.shape:
                raise RuntimeError(
                    f"{name} of parameter {i} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}: this "
                    "state dict is of another model. Load one saved with the same parameters in the same order."
                )


def check_codes(optimizer: RuleOptimizer, state: dict[str, Any], name: str, index: int, p: Tensor) -> None:
    """Raise RuntimeError where a state's codes and scales are not those of so many elements, whatever the block."""
    codec, scale = held_codec(optimizer, state, name, p), state[f"{name}_{SCALE}"]
    codes = state[name]
    assert codec is not None
    fits = codec.sharing > 0 and 0 <= codes.numel() * codec.each[0] - p.numel() < max(codec.sharing, 1)
    if codes.dtype != codec.dtypes[0] or not fits or codes.numel() * codec.each[0] != codec.sharing * scale.numel():
        raise RuntimeError(
            f"{name} of parameter {index} has {codes.numel():,} items of {codes.dtype} and {scale.numel():,} scales, "
            f"which is not how {p.numel():,} elements are kept. Load a state dict saved with the same parameters."
        )


def restore_dtypes(optimizer: RuleOptimizer, loaded: dict[str, Any]) -> None:
    """Give the states the dtypes in which they were saved, and the numbers among them theirs."""
    indices = [i for group in loaded["param_groups"] for i in group["params"]]
    counted = {"step", COUNT, *chain.from_iterable(map(optimizer.counted_names, optimizer.param_groups))}
    for i, p in zip(indices, optimizer._flat, strict=True):
        for name, value in loaded["state"].get(i, {}).items():
            if name in counted:
                optimizer.state[p][name] = value  # torch has cast what is carried besides step
                own_number(optimizer, p, name)
            elif isinstance(value, Tensor) and value.dtype != optimizer.state[p][name].dtype:
                optimizer.state[p][name] = value.to(p.device, copy=True)


def group_of(optimizer: RuleOptimizer, p: Tensor) -> dict[str, Any]:
    """The parameter group that `p` is in."""
    return next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))


def own_number(optimizer: RuleOptimizer, p: Tensor, name: str) -> None:
    """Make a state that is a number what it must be: a tensor of its own, of the right dtype, where it belongs."""
    group, value = group_of(optimizer, p), optimizer.state[p][name]
    if name == "step" and not optimizer.step_is_tensor:
        optimizer.state[p][name] = int(value)
        return
    device = p.device if group.get("capturable") or optimizer.counts_on_device else torch.device("cpu")
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), device="cpu")
    optimizer.state[p][name] = value.to(device, counted_dtype(group, name), copy=True).reshape(())


def fill_in(optimizer: RuleOptimizer, options: dict[str, Any]) -> None:
    """Give the groups and states of a checkpoint what they lack because it is older."""
    written = inspect.signature(type(optimizer).__init__).parameters
    for group in optimizer.param_groups:
        # A checkpoint from before an option existed lacks its key, and was made with what is its default now.
        for name, value in optimizer.defaults.items():
            if name in options and name not in optimizer.option_names:
                continue  # a group has it only where it was asked for
            default = written[name].default if name in written else options.get(name, value)
            group.setdefault(name, value if default is inspect.Parameter.empty else default)
        for p in group["params"]:
            for name in optimizer.counted_names(group):
                if name in optimizer.state.get(p, ()) and not isinstance(optimizer.state[p][name], Tensor):
                    own_number(optimizer, p, name)


def with_own_memory(values: Any) -> Any:
    """A parameter's state with numbers that share memory with no other's, as counted ones do."""
    if not isinstance(values, dict):
        return values
    return {name: v.clone() if isinstance(v, Tensor) and not v.dim() else v for name, v in values.items()}


def own_memory(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    # Loaded into torch.optim, steps that share memory would each be counted once for every one of them.
    return {**state_dict, "state": {i: with_own_memory(values) for i, values in state_dict["state"].items()}}
