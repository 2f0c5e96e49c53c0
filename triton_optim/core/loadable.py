"""Checks of a state dict that is to be loaded: all are made before anything changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..engine.prologue import check_states
from ..precision.codecs import HALVES, PRECISION, RESIDUALS, SCALE, with_residual
from ..precision.kept import check_state
from ..spec import AVERAGE, COUNT, WEIGHTS, Update
from ..util.layout import ORDINARY, local
from .foreign import origin, refusal
from .saved_form import AGAIN, Names, loaded_state

# What a group has only where it was asked for.
OPTIONAL = (*PRECISION, "seed", "ema_decay", "ema_warmup", "offload")


def check_keys(state_dict: Any) -> None:
    """Raise where this is no state dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state dict is a dict, and this a {type(state_dict).__name__}. {AGAIN}")
    if not {"state", "param_groups"} <= state_dict.keys():
        found = sorted(map(str, state_dict))
        raise KeyError(f"a state dict has the keys 'state' and 'param_groups', and this {found}. {AGAIN}")


def check_groups(optimizer: Update, state_dict: Any) -> None:
    """Raise where this is no state dict, or another library's, or has other groups than the optimizer."""
    check_keys(state_dict)
    name = type(optimizer).__name__
    states, groups = state_dict["state"], state_dict["param_groups"]
    whole = isinstance(groups, (list, tuple)) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups
    )
    if not whole or not isinstance(states, Mapping):
        raise ValueError(
            "'state' is a dict of states by parameter, 'param_groups' a list of dicts, each with a list 'params'; here "
            f"they are {states!r:.80} and {groups!r:.80}. {AGAIN}"
        )
    if library := origin(state_dict):
        raise ValueError(refusal(library, name))
    saved, own = ([len(group["params"]) for group in which] for which in (groups, optimizer.param_groups))
    if saved != own:
        what = (
            "a different number of parameter groups"
            if len(saved) != len(own)
            else "a parameter group that doesn't match the size of optimizer's group"
        )
        raise ValueError(
            f"loaded state dict has {what}: its groups are of {saved} parameters, those of {name} of {own}. Load one "
            "saved with the same parameters."
        )
    # An option may be newer than the checkpoint; a hyperparameter can't be.
    numbers = {name for name, value in optimizer.defaults.items() if not isinstance(value, (bool, type(None)))}
    needed = sorted(numbers - {*OPTIONAL})
    for number, group in enumerate(groups):
        if missing := [name for name in needed if name not in group]:
            raise KeyError(
                f"group {number} of the state dict holds {sorted(group)} and lacks {missing}: it is not one of "
                f"{name}'s. Load it into the optimizer that saved it."
            )


class Checks:
    """What the states of the parameters of a group must be to be loaded; what is the same for all is asked once.

    Args:
        optimizer: whose they will be.
        names: of its states.
        group: with all that the optimizer knows.
    """

    def __init__(self, optimizer: Update, names: Names, group: dict[str, Any]) -> None:
        self._optimizer, self._names, self._group = optimizer, names, group
        self._known: set[tuple[str, ...]] = set()  # states with these names are its
        self._complete: set[Any] = set()  # states with these names lack none

    def checked(self, index: Any, p: Tensor, state: Any) -> dict[str, Any]:
        """:func:`loaded_state` of a parameter, in which all that the optimizer knows is as it must be."""
        optimizer, names = self._optimizer, self._names
        if type(state) is not dict and not isinstance(state, Mapping):
            raise ValueError(f"the state of parameter {index} is {state!r:.80}, no dict of states by name. {AGAIN}")
        form = tuple(state)
        if form not in self._known:
            self._check_names(index, state)
            self._known.add(form)
        if not names.scales.isdisjoint(form):
            check_no_scales(names, index, state)
        held = loaded_state(optimizer, index, p, state)
        there: Any = tuple(held)
        for part, value in held.items():
            elementwise = part in names.elementwise
            if elementwise and is_like(p, value):  # as most are
                continue
            if value is None:
                there = tuple(name for name in there if name != part)
                continue
            if isinstance(value, Tensor):
                check_tensor(index, p, part, value)
            if part in names.numbers:
                check_number(index, part, value, whole=part in ("step", COUNT))
            elif elementwise:
                check_state(optimizer, index, p, part, held)
            elif part == WEIGHTS or part in RESIDUALS or part in optimizer.kept_names:
                check_part(index, p, part, value)
        if optimizer.kept_names:
            check_states(optimizer, self._group, index, p, held)
        form = (*there, p.shape, p.dtype) if optimizer.kept_names else there
        if form not in self._complete:
            check_complete(optimizer, self._group, index, p, there)
            self._complete.add(form)
        return held

    def _check_names(self, index: Any, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a state has none of the optimizer's names, or others in place of them."""
        optimizer, names = self._optimizer, self._names
        known = {*names.counted, *names.elementwise, *optimizer.kept_names}
        parts = {*RESIDUALS, COUNT, WEIGHTS, *names.scales}
        others = state.keys() - known - parts
        # Names that optimizers share, such as step, prove nothing where others are in place of ours. Beside ours they
        # may be the user's own.
        complete = any(state.keys() >= {*variant.state_names} for variant in optimizer.variants)
        wrong = others and (not complete or not others.isdisjoint(names_of_all(Update)))
        if state and (not (known | parts) & state.keys() or wrong):
            raise ValueError(
                f"the state of parameter {index} holds {sorted(state)}, {type(optimizer).__name__} keeps "
                f"{sorted(known)}: this state dict is of another optimizer. Load it into that one."
            )


def names_of_all(cls: type[Update]) -> set[str]:
    """The names of the tensors that optimizers of this class keep. What a wrapper adds is left out: where it is taken
    away, the rest goes on.
    """
    own = set() if "wrappers" in cls.__dict__ else {*cls.declared, *cls.kept_names}
    return own.union(*map(names_of_all, cls.__subclasses__()))


def check_no_scales(names: Names, index: Any, state: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a quantized state does not say how it is read."""
    for part in names.elementwise:
        if isinstance(state.get(f"{part}_{SCALE}"), Tensor):
            raise RuntimeError(
                f"{part} of parameter {index} is quantized and does not say how: its scale is a state of "
                "its own. Load the optimizer's state_dict(), or to_torch_state_dict(optimizer) of where it was saved."
            )


def is_like(p: Tensor, value: Any) -> bool:
    """Whether a state is an ordinary tensor of real numbers, and like its parameter: all is well with it."""
    return (
        type(value) is Tensor
        and type(p) in ORDINARY
        and value.shape == p.shape
        and value.is_floating_point()
        and value.layout == torch.strided
        and not (value.is_meta or p.is_complex())
    )


def check_tensor(index: Any, p: Tensor, name: str, value: Tensor) -> None:
    """Raise RuntimeError where a tensor has no numbers of its own to load."""
    if type(value) is Tensor and value.layout == torch.strided and not value.is_meta:  # as most are
        return
    own = local(value)
    kind = type(own)
    if hasattr(own, "__tensor_flatten__") and kind is not type(local(p)):
        raise RuntimeError(
            f"{name} of parameter {index} is a {kind.__module__}.{kind.__qualname__}, which keeps its numbers in a way "
            "of its own. Load triton_optim.convert_state_dict(optimizer, state_dict)."
        )
    if own.layout != torch.strided or (own.is_meta and not local(p).is_meta):
        what = "is on meta and has no numbers" if own.is_meta else f"is {own.layout}, not dense"
        raise RuntimeError(f"{name} of parameter {index} {what}. {AGAIN}")


def check_number(index: Any, name: str, value: Any, whole: bool) -> None:
    """Raise RuntimeError where a scalar state is no number, or a count is none."""
    number = value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        number = value.item()
    fits = type(number) is float or isinstance(number, Real)
    if fits and whole:
        fits = math.isfinite(number) and number >= 0 and number % 1 == 0
    if not fits:
        kind = "a count of steps, 0 or more" if whole else "a number"
        raise RuntimeError(f"{name} of parameter {index} is {value!r:.80}; it must be {kind}. {AGAIN}")


def check_part(index: Any, p: Tensor, name: str, value: Any) -> None:
    """Raise RuntimeError where a correction of a parameter, or what a prologue keeps, is no such tensor."""
    if name == WEIGHTS:
        fits = isinstance(value, Tensor) and value.dtype == p.dtype
    elif name in RESIDUALS and p.dtype in HALVES:
        codec = with_residual(RESIDUALS[name], p.dtype)
        fits = isinstance(value, Tensor) and value.dtype == codec.dtypes[1 + codec.suffixes.index(name)]
    else:
        fits = isinstance(value, Tensor) and value.is_floating_point()
    if not fits or (name in (*RESIDUALS, WEIGHTS) and value.shape != p.shape):
        found = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
        raise RuntimeError(
            f"{name} of parameter {index} is {found}, the parameter {p.dtype}, {tuple(p.shape)}. Load a state dict of "
            "a model of the same shapes and dtypes; master_state_dict has the weights for others."
        )


def check_complete(optimizer: Update, group: dict[str, Any], index: Any, p: Tensor, there: Sequence[str]) -> None:
    """Raise ValueError where a state that has been started lacks what the group's variant keeps."""
    variant = optimizer.variant(group)
    needed = {*variant.state_names}
    if variant.staged and optimizer.kept_names:
        needed |= optimizer.first_kept(torch.empty(p.shape, dtype=p.dtype, device="meta"), group).keys()
    if needed & {*there} or (optimizer.counts_steps and "step" in there):
        needed |= {"step"} if optimizer.counts_steps else set()
        needed |= optimizer.first_scalar_states(group).keys() - {COUNT}
    else:
        needed = set()
    for one, other in ((AVERAGE, COUNT), (COUNT, AVERAGE), (WEIGHTS, AVERAGE), ("residual_low", "residual")):
        needed |= {other} if one in there else set()
    if missing := sorted(needed.difference(there)):
        raise ValueError(
            f"the state of parameter {index} holds {sorted(there)} and lacks {missing}: {type(optimizer).__name__} "
            f"can't go on from it. {AGAIN}"
        )
