"""How the parameters and states of a group are kept: which codec each role has, its parts among the states, and the
way from one codec to another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .kernels.codecs import BLOCKS, decode, encode
from .kernels.language import torch_form
from .layout import in_layout_of, is_sharded, is_wrapper, local, with_local

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer

# The options of a group that say how something is kept.
PRECISION = ("state_dtype", "param_precision", "ema_dtype")
PARAM_PRECISIONS = ("storage", "stochastic", "kahan", "split24", "split32", "master")
STATE_CODES = tuple(BLOCKS)
HALVES = (torch.bfloat16, torch.float16)

# States of fewer elements are not worth a scale's memory, and biases and norms are sensitive.
CODES_FROM = 4096

SCALE = "scale"
CODES_VERSION = 1  # of what codes stand for (kernels/codecs.py); it is saved with them
_decode, _encode = torch_form(decode), torch_form(encode)


class Codec(NamedTuple):
    """How one role is kept.

    Attributes:
        name: what kernels/codecs.py calls it.
        dtypes: of its parts.
        suffixes: of the parts beside the first: a state's name and this, or a parameter's this alone, name them.
        each: how many elements an item of each part holds.
        random: whether it takes random bits.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    suffixes: tuple[str, ...] = ()
    each: tuple[int, ...] = (1,)
    random: bool = False

    @property
    def sharing(self) -> int:
        """How many elements share a scale; 0 where there is none."""
        return self.each[-1] if SCALE in self.suffixes else 0

    @property
    def exact(self) -> bool:
        """Whether what `encode` gives for the first part is a number of its dtype, so that nothing rounds it again."""
        return self.name not in ("plain", "master")

    @property
    def nbytes(self) -> float:
        """Bytes an element."""
        return sum(dtype.itemsize / each for dtype, each in zip(self.dtypes, self.each, strict=True))


@cache
def plain(dtype: torch.dtype) -> Codec:
    """Values as they are, rounded to the nearest."""
    return Codec("plain", (dtype,))


@cache
def stochastic(dtype: torch.dtype) -> Codec:
    return Codec(f"stochastic {_name(dtype)}", (dtype,), random=True)


@cache
def codes(state_dtype: str, nonnegative: bool) -> Codec:
    """Codes in blocks, ``"int8"`` or ``"int4"``; without a sign for what has none."""
    each, scale = {"int8": (1, torch.float32), "int4": (2, torch.bfloat16)}[state_dtype]
    name = f"u{state_dtype}" if nonnegative else state_dtype
    return Codec(name, (torch.int8, scale), (SCALE,), (each, BLOCKS[state_dtype]), random=state_dtype == "int4")


@cache
def corrected(precision: str, dtype: torch.dtype) -> Codec:
    """A bfloat16 or float16 parameter with what its rounding left."""
    if precision == "master":
        return Codec("master", (dtype, torch.float32), ("master",), (1, 1))
    if precision == "kahan":
        return Codec(f"kahan {_name(dtype)}", (dtype, dtype), ("compensation",), (1, 1))
    if precision == "split24":
        return Codec(f"split24 {_name(dtype)}", (dtype, torch.int8), ("residual",), (1, 1), random=True)
    parts = (dtype, torch.int8, torch.int8)
    return Codec(f"split32 {_name(dtype)}", parts, ("residual", "residual_low"), (1, 1, 1))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What a parameter's corrections are called among its states, and which precision has which.
CORRECTIONS = {"master": "master", "compensation": "kahan", "residual_low": "split32", "residual": "split24"}


def parameter_codec(group: dict[str, Any], dtype: torch.dtype) -> Codec:
    """How a parameter of `dtype` is kept; one that is neither bfloat16 nor float16 as it is."""
    precision = group.get("param_precision", "storage")
    if dtype not in HALVES or precision == "storage":
        return plain(dtype)
    return stochastic(dtype) if precision == "stochastic" else corrected(precision, dtype)


def state_codec(
    optimizer: RuleOptimizer, group: dict[str, Any], name: str, p: Tensor, held: Codec | None = None
) -> Codec:
    """How a state of `p` is kept.

    Args:
        held: how it is kept now, which stays where the group says nothing else.
    """
    if name == AVERAGE:
        return average_codec(group, p)
    wanted: Any = group.get("state_dtype")
    if wanted in STATE_CODES:
        small = local(p).numel() < CODES_FROM or not local(p).is_contiguous() or is_wrapper(local(p))
        if small or name in optimizer.never_quantized:
            return plain(torch.promote_types(p.dtype, torch.float32))
        return codes(wanted, name in optimizer.nonnegative)
    if wanted == torch.bfloat16 and not p.is_complex():
        return stochastic(wanted)
    return plain(wanted or (held.dtypes[0] if held is not None and held.name == "plain" else p.dtype))


def check_names(cls: type[RuleOptimizer]) -> None:
    """Raise TypeError where an optimizer's states have names that are taken, or it declares what it has not."""
    names = {name for variant in cls.variants for name in variant.state_names}
    taken = {"step", AVERAGE, COUNT, *CORRECTIONS, *(f"{name}_{SCALE}" for name in names)}
    if both := sorted(taken & {*names, *cls.prologue_names}):
        raise TypeError(f"{cls.__name__} has states {both}, names of what every optimizer may keep. Rename them.")
    for what in ("nonnegative", "never_quantized"):
        declared = cls.__dict__.get(what, ())
        if isinstance(declared, str) or not names.issuperset(declared):
            raise TypeError(f"{cls.__name__}.{what} is {declared!r}; it must be a tuple of names in {sorted(names)}.")


def held_codec(optimizer: RuleOptimizer, state: dict[str, Any], name: str, p: Tensor) -> Codec | None:
    """How a state that is there is kept; None where there is none. Blocks of any size are known, and the dtype of the
    scales tells how many bits a code has.
    """
    value, scale = state.get(name), state.get(f"{name}_{SCALE}")
    if not isinstance(value, Tensor):
        return None
    if scale is None or value.is_floating_point() or value.is_complex():  # a value put in place of codes is no code
        return plain(value.dtype)
    code = codes("int8" if scale.dtype == torch.float32 else "int4", name in optimizer.nonnegative)
    return in_blocks(code, value.numel() * code.each[0] // max(scale.numel(), 1))


def in_blocks(codec: Codec, size: int) -> Codec:
    """These codes in blocks of another size."""
    return codec._replace(each=(codec.each[0], size))


def check_state(optimizer: RuleOptimizer, index: int, p: Tensor, name: str, state: dict[str, Any]) -> None:
    """Raise RuntimeError where a state that is there does not belong to its parameter."""
    value = state[name]
    if not isinstance(value, Tensor):
        raise RuntimeError(
            f"{name} of parameter {index} is {value!r:.80}, no tensor. Load a state dict of the same parameters, or "
            "clear opt.state."
        )
    codec = held_codec(optimizer, state, name, p)
    if codec is not None and codec.sharing:
        scale = state[f"{name}_{SCALE}"]
        held = value.numel() * codec.each[0]
        fits = (value.dtype, scale.dtype) == codec.dtypes and 0 <= held - p.numel() < codec.sharing
        if not fits or held != codec.sharing * scale.numel():
            raise RuntimeError(
                f"{name} of parameter {index} has {value.numel():,} items of {value.dtype} and {scale.numel():,} "
                f"scales of {scale.dtype}, which is not how {p.numel():,} elements are kept. Load a state dict of the "
                "same parameters, or clear opt.state."
            )
        return
    if value.is_complex() != p.is_complex() or not (value.is_floating_point() or value.is_complex()):
        raise RuntimeError(
            f"{name} of parameter {index} is {value.dtype}, the parameter {p.dtype}. A state is of floating-point "
            "numbers, complex ones of a complex parameter; codes need their scales beside them. Load a state dict of "
            "the same parameters, or clear opt.state."
        )
    check_shape(index, p, name, value)


def check_corrections(index: int, p: Tensor, state: dict[str, Any]) -> None:
    """Raise RuntimeError where what is kept beside a parameter does not belong to it."""
    codec = held_parameter_codec(state, p)
    for name, dtype in zip(part_names(codec, None), codec.dtypes[1:], strict=True):
        value = state.get(name)
        if not isinstance(value, Tensor) or value.dtype != dtype:
            found = value.dtype if isinstance(value, Tensor) else f"{value!r:.80}"
            raise RuntimeError(
                f"{name} of parameter {index} is {found}, and {dtype} beside a parameter of {p.dtype}. Load a state "
                "dict of the same parameters, or clear opt.state."
            )
        check_shape(index, p, name, value)


def check_shape(index: int, p: Tensor, name: str, value: Tensor) -> None:
    """Raise RuntimeError where a state is not of its parameter's shape, or placed otherwise."""
    placed = [getattr(t, "placements", None) for t in (p, value)]
    if value.shape != p.shape or placed[0] != placed[1] or local(value).shape != local(p).shape:
        theirs, ours = (
            f"{tuple(t.shape)}, placed {where}" for t, where in zip((value, p), reversed(placed), strict=True)
        )
        raise RuntimeError(
            f"{name} of parameter {index} has shape {theirs}; the parameter {ours}. "
            "Load a state dict of the same parameters, placed alike, or clear opt.state."
        )


def held_parameter_codec(state: dict[str, Any], p: Tensor) -> Codec:
    """How a parameter is kept, as its corrections say."""
    for name, precision in CORRECTIONS.items():
        if name in state and p.dtype in HALVES:
            return corrected(precision, p.dtype)
    return plain(p.dtype)


def part_names(codec: Codec, name: str | None) -> list[str]:
    """What the parts beside the first are called among the states; `name` is None for a parameter's."""
    if not codec.suffixes:  # most have none
        return []
    return [suffix if name is None else f"{name}_{suffix}" for suffix in codec.suffixes]


def read(codec: Codec, parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The value in the shape of `like`, in float32; what is kept as it is comes as it is."""
    if codec.name == "plain":
        return parts[0]
    if not codec.sharing:
        return _decode(tuple(map(wide, parts)), codec.name)  # type: ignore[no-any-return]
    scale = wide(parts[1]).view(-1, 1)
    value: Tensor = _decode((wide(parts[0]).view(len(scale), -1), scale), codec.name)
    return value.flatten()[: like.numel()].view(like.shape)


def write(codec: Codec, parts: Sequence[Tensor], value: Tensor, role: int = 0, random: Tensor | None = None) -> None:
    """Keep a value of the parts' shape.

    Args:
        role: the number of the result among the rule's.
        random: of kernels.codecs.hashed; None rounds what would be rounded stochastically as half-way bits do.
    """
    if codec.name == "plain":
        parts[0].copy_(value)
        return
    value = value.to(torch.float32)
    if codec.sharing:
        blocks = len(parts[1])
        value = _padded(value, blocks * codec.sharing).view(blocks, codec.sharing)
        random = None if random is None else _padded(random, blocks * codec.sharing).view(blocks, codec.sharing)
    if random is None:
        random = torch.full_like(value, -0x7FFF8000, dtype=torch.int32)
    for part, kept in zip(parts, _encode(value, random, role, codec.name), strict=True):
        part.copy_(kept.reshape(part.shape))


def _padded(x: Tensor, numel: int) -> Tensor:
    return torch.nn.functional.pad(x.flatten(), (0, numel - x.numel()))


def wide(part: Tensor) -> Tensor:
    """As `decode` takes it; of float64, which is only kept as it is, the same."""
    if not part.is_floating_point():
        return part.to(torch.int32)
    return part.to(torch.float32) if part.itemsize < 4 else part


def new_parts(codec: Codec, value: Tensor, first: Tensor | None = None) -> list[Tensor]:
    """Tensors that keep `value`. Those with an item for every element are like it in memory; a DTensor's, DTensors.

    Args:
        first: the tensor that is to be the first part.
    """
    if codec.sharing:
        own = local(value)
        blocks = math.ceil(own.numel() / codec.sharing)
        sizes = [blocks * codec.sharing // each for each in codec.each]
        parts = [
            torch.zeros(size, dtype=dtype, device=own.device) for size, dtype in zip(sizes, codec.dtypes, strict=True)
        ]
        write(codec, parts, own)
        return parts
    if codec.name == "plain" and first is None:
        return [value if value.dtype == codec.dtypes[0] else value.to(codec.dtypes[0])]
    parts = [torch.empty_like(value, dtype=dtype, memory_format=torch.preserve_format) for dtype in codec.dtypes]
    if first is not None:
        parts[0] = first
    write(codec, list(map(local, parts)), local(value))
    return parts


def keep_state(optimizer: RuleOptimizer, state: dict[str, Any], name: str, p: Tensor, wanted: Codec) -> None:
    """Bring a state from the codec that it has into `wanted`."""
    held = held_codec(optimizer, state, name, p)
    assert held is not None
    if held == wanted or (held.dtypes == wanted.dtypes and not held.sharing and not wanted.sharing):
        return
    names = [name, *part_names(held, name)]
    if held.sharing:
        value = read(held, [state[n] for n in names], local(p))
        value = with_local(p, value)
    else:
        value = state[name]
        if wanted.sharing:
            value = in_layout_of(local(p), local(value))
    for n in names:
        del state[n]
    parts = new_parts(wanted, value)
    state |= dict(zip([name, *part_names(wanted, name)], parts, strict=True))


def keep_parameter(state: dict[str, Any], p: Tensor, wanted: Codec) -> None:
    """Bring a parameter and its corrections from the codec that they have into `wanted`."""
    held = held_parameter_codec(state, p)
    if held.suffixes == wanted.suffixes:
        return
    names = part_names(held, None)
    own = p.detach()
    value = own.float()
    if names:
        value = with_local(own, read(held, [local(own), *(local(state[n]) for n in names)], local(own)))
    for n in names:
        del state[n]
    if wanted.suffixes:
        state |= dict(zip(part_names(wanted, None), new_parts(wanted, value, first=own)[1:], strict=True))


def check_precision(optimizer: RuleOptimizer, group: dict[str, Any]) -> None:
    """Raise ValueError where a group's ``state_dtype`` or ``param_precision`` is none of those there are, RuntimeError
    where its optimizer or its parameters cannot have it.
    """
    name, params = type(optimizer).__name__, group["params"]
    state_dtype, precision = group.get("state_dtype"), group.get("param_precision", "storage")
    if state_dtype not in (None, torch.float32, torch.bfloat16, *STATE_CODES):
        raise ValueError(
            f"Invalid state_dtype: {state_dtype!r}. Use None (the parameter's), torch.float32, torch.bfloat16, "
            f"{' or '.join(map(_quoted, STATE_CODES))}."
        )
    if precision not in PARAM_PRECISIONS:
        raise ValueError(
            f"Invalid param_precision: {precision!r}. Use one of {', '.join(map(_quoted, PARAM_PRECISIONS))}."
        )
    asked = f"state_dtype={_quoted(state_dtype)}"
    if precision != "storage":
        for i, p in enumerate(params):
            if p.dtype not in HALVES:
                raise RuntimeError(
                    f"{name}: param_precision={precision!r} is for bfloat16 and float16 parameters; parameter {i} is "
                    f"{p.dtype}, which is kept as it is. Leave param_precision out for its group."
                )
    if state_dtype is not None and optimizer.running_variant(group).prologue and optimizer.prologue_names:
        raise RuntimeError(
            f"{name}: {asked} is for the states of a rule; {optimizer.prologue_names} are what comes before it keeps, "
            "in the parameter's dtype. Leave state_dtype out."
        )
    if state_dtype is not None and any(p.is_complex() for p in params):
        raise RuntimeError(f"{name}: states of complex parameters are complex, not {asked}. Leave state_dtype out.")
    if state_dtype in STATE_CODES and any(map(is_sharded, params)):
        raise RuntimeError(
            f"{name}: {asked} has blocks in the order of memory, which another sharding would cut elsewhere. Use "
            "state_dtype=torch.bfloat16 for sharded parameters."
        )
    if not keeps_plainly(group) and group.get("differentiable"):
        raise RuntimeError(
            f"{name}: a step that rounds or codes has no derivative. Leave differentiable out, or {asked} and "
            f"param_precision={precision!r}."
        )
    if not keeps_plainly(group) and not optimizer.takes_dense_gradients:
        raise RuntimeError(
            f"{name} updates single rows where they were gathered: they are kept as they are. Use "
            'state_dtype=torch.float32 or None, and param_precision="storage".'
        )


# The states of the exponential moving average of the weights: the average, and how many values it is of.
AVERAGE, COUNT = "ema", "n_averaged"


def averages(group: dict[str, Any]) -> bool:
    """Whether a group's parameters are averaged."""
    return group.get("ema_decay") is not None


def average_codec(group: dict[str, Any], p: Tensor) -> Codec:
    """How the average of a parameter is kept."""
    wanted = group.get("ema_dtype")
    if p.is_complex():
        return plain(p.dtype)
    if wanted == torch.bfloat16:
        return stochastic(wanted)
    return plain(wanted or torch.promote_types(p.dtype, torch.float32))


def _quoted(value: Any) -> str:
    return repr(value) if not isinstance(value, str) else f'"{value}"'


def keeps_plainly(group: dict[str, Any]) -> bool:
    """Whether a group's parameters and states are kept as they are."""
    return group.get("state_dtype") in (None, torch.float32) and group.get("param_precision", "storage") == "storage"


def rounds(group: dict[str, Any]) -> bool:
    """Whether anything of a group may be rounded stochastically: then its steps are counted."""
    return (
        group.get("state_dtype") in (torch.bfloat16, "int4")
        or group.get("param_precision") in ("stochastic", "split24")
        or (averages(group) and group.get("ema_dtype") == torch.bfloat16)
    )
