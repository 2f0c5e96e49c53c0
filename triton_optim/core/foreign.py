"""Checkpoints of bitsandbytes, torchao, optimi and flashoptim, whose states are ours in forms of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..util.layout import ORDINARY, local, with_local

# The states of each optimizer that another library has, too.
STATES = {
    "Adam": ("exp_avg", "exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "Lion": ("exp_avg",),
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg",),
    "Adagrad": ("sum",),
}
KINDS = {
    "bitsandbytes": ("Adam", "Lion", "SGD", "RMSprop", "Adagrad"),
    "torchao": ("Adam",),
    "optimi": ("Adam", "RAdam", "Lion", "SGD"),
    "flashoptim": ("Adam", "Lion", "SGD"),
}
# What a converted group takes from the other's, where both have it.
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "amsgrad", "name")

WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes puts the tensors of a state
BLOCKS = (256, 2048)  # of bitsandbytes' codes, today and before version 0.44
GROUP = 32  # of flashoptim's


def origin(state_dict: Mapping[str, Any]) -> str | None:
    """The library that saved a state dict, if its form is one of those that are known; None of torch's and ours."""
    states = [s for s in state_dict["state"].values() if type(s) is dict or isinstance(s, Mapping)]
    groups = state_dict["param_groups"]
    if not {WRAPPED, "state1"}.isdisjoint(chain.from_iterable(states)):
        return "bitsandbytes"
    if any("master_bytewidth" in group for group in groups):
        return "flashoptim"
    if any({"decouple_lr", "kahan_sum"} <= group.keys() for group in groups):
        return "optimi"
    if any(has_codes(value) for state in states for value in state.values() if type(value) not in ORDINARY):
        return "torchao"
    return None


def refusal(library: str, name: str) -> str:
    """What is said to who loads a state dict of `library` into an optimizer of this name."""
    return (
        f"this state dict was saved by {library}, which keeps states in a form of its own. Load "
        f"triton_optim.convert_state_dict(optimizer, state_dict), where optimizer is this {name}."
    )


def plain(value: Any) -> Any:
    """A number that a library keeps in a tensor."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def unknown(library: str, index: Any, names: Any, kind: str) -> ValueError:
    """The error of a state that a library does not keep."""
    return ValueError(
        f"the state of parameter {index} holds {sorted(map(str, names))}, which is not what {kind} of {library} keeps. "
        "Convert it for the optimizer that saved it."
    )


# bitsandbytes: states without names, their codes an index into a table of 256 values, a scale for each block.


def from_bitsandbytes(kind: str, group: Any, index: Any, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Our states of a parameter of bitsandbytes."""
    parts = {name: value for name, value in state.items() if name != WRAPPED} | state.get(WRAPPED, {})
    numbered = [name for name in ("state1", "state2") if name in parts]
    known = {"step", *(f"{part}{number}" for part in ("state", "qmap", "absmax") for number in (1, 2))}
    shapes = {parts[name].shape for name in numbered}
    if len(numbered) != len(STATES[kind]) or "step" not in parts or parts.keys() - known or shapes != {p.shape}:
        raise unknown("bitsandbytes", index, parts, kind)
    converted = {"step": parts["step"]}
    for name, numbered_name in zip(STATES[kind], numbered, strict=True):
        value, number = parts[numbered_name], numbered_name[-1]
        if value.dtype == torch.uint8:
            scales, table = parts.get(f"absmax{number}"), parts.get(f"qmap{number}")
            blocks = 0 if scales is None else scales.numel()
            size = next((size for size in BLOCKS if -(-value.numel() // size) == blocks), None)
            if size is None or table is None:
                raise ValueError(
                    f"{numbered_name} of parameter {index} is {value.numel():,} codes with {blocks} scales; what can "
                    f"be read has blocks of {BLOCKS}. Load it with bitsandbytes as it is today, and save it there."
                )
            decoded = table[value.flatten().long()] * scales.repeat_interleave(size)[: value.numel()]
            value = decoded.view(value.shape)
        converted[name] = value
    return converted


def bitsandbytes_group(kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Our hyperparameters of a group of bitsandbytes."""
    first = group["betas"][0]
    own = {
        "SGD": {"momentum": first, "dampening": 0.0},
        "RMSprop": {"alpha": first},
        "Adam": {"decoupled_weight_decay": True},
    }
    return own.get(kind, {})


# torchao: tensors that know how they are decoded.


def has_codes(value: Any) -> bool:
    """Whether a state is quantized."""
    if not isinstance(value, Tensor):
        return False
    own = local(value)
    return hasattr(own, "__tensor_flatten__") and type(own).dequantize is not Tensor.dequantize


def from_torchao(kind: str, group: Any, index: Any, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Our states of a parameter of torchao."""
    decoded = {name: value for name, value in state.items() if has_codes(value)}
    return state | {name: with_local(p, local(value).dequantize().float()) for name, value in decoded.items()}


# optimi: one count for a group, and moments whose bias is corrected as they are updated.


def from_optimi(kind: str, group: Any, index: Any, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Our states of a parameter of optimi."""
    step = plain(state.pop("step", group.get("step", 1)))
    kept, _ = state.pop("kahan_comp", None), state.pop("group", None)
    moments = ("exp_avg", "exp_avg_sq")[: len(STATES[kind])]
    if state.keys() != {*moments}:
        raise unknown("optimi", index, state, kind)
    converted = {"step": step}
    for name, moment, beta in zip(STATES[kind], moments, ("beta1", "beta2"), strict=False):
        value = state[moment]
        if len(moments) == 2:
            value = value.float() * (1 - group[beta] ** step)
        converted[name] = value
    if isinstance(kept, Tensor) and kept.is_floating_point():
        converted["compensation"] = kept
    return converted


def optimi_group(kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Our hyperparameters of a group of optimi."""
    own: dict[str, Any] = {}
    decay, decoupled = group["weight_decay"], group.get("decouple_wd", True)
    if decay and ((kind == "SGD" and (decoupled or group["decouple_lr"])) or (group["decouple_lr"] and not decoupled)):
        raise ValueError(
            f"a group of optimi has weight_decay={decay}, decouple_wd={decoupled}, decouple_lr={group['decouple_lr']}: "
            f"{kind} has no such decay. Set the group's weight_decay to 0, and decay the parameters yourself."
        )
    if group["decouple_lr"]:  # of it the learning rate is a fraction of the largest
        own["weight_decay"] = decay / group["max_lr"]
    if kind in ("Adam", "RAdam"):
        own["decoupled_weight_decay"] = decoupled
    if kind == "SGD":
        own["dampening"] = group["momentum"] if group["dampening"] else 0.0
    else:
        own["betas"] = (group["beta1"], group["beta2"])
    return own


# flashoptim: codes of softsign, of second moments those of the root, a float16 scale for each group.


def from_flashoptim(kind: str, group: Any, index: Any, p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Our states of a parameter of flashoptim."""
    if state.pop("error_bits", None) is not None:
        warnings.warn(
            f"error_bits of parameter {index} are left out: its weights stay as the model has them, rounded. Give "
            "load_master_state_dict what get_fp32_model_state_dict of flashoptim returns: it keeps what rounding left.",
            stacklevel=3,
        )
    for coded in [name for name in state if name.endswith("::quantized")]:
        name = coded.removesuffix("::quantized")
        held, scales = state.pop(coded), state.pop(f"{name}::scales")
        q, second = local(held).flatten().float(), name == "exp_avg_sq"
        # The scales of a bfloat16 parameter are said to be bfloat16, so that torch casts them to nothing else.
        scale = local(scales).view(torch.float16).float().repeat_interleave(GROUP)[: q.numel()]
        part = q / (255 if second else 127)
        value = (part * scale).square() if second else part / (2 - part.abs()) * scale
        state[name] = with_local(p, value.view(local(held).shape))
    if state.keys() - {"step", *STATES[kind]}:
        raise unknown("flashoptim", index, state, kind)
    return state


def no_more(kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: the names of its hyperparameters are ours."""
    return {}


Converter = Callable[[str, Any, Any, Tensor, dict[str, Any]], dict[str, Any]]
CONVERTERS: dict[str, Converter] = {
    "bitsandbytes": from_bitsandbytes,
    "torchao": from_torchao,
    "optimi": from_optimi,
    "flashoptim": from_flashoptim,
}
GROUPS = {"bitsandbytes": bitsandbytes_group, "torchao": no_more, "optimi": optimi_group, "flashoptim": no_more}
