"""How the parameters and states of a group are kept: which codec each role has, its parts among the states, and the
way from one codec to another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.codecs import BLOCKS, codes_of, decode, encode, value_of_code
from ..kernels.language import torch_form
from ..spec import AVERAGE, COUNT, WEIGHTS, State, Update
from ..util.layout import is_wrapper, local

# The options of a group that say how something is kept.
PRECISION = ("state_dtype", "param_precision", "ema_dtype")
PARAM_PRECISIONS = ("storage", "stochastic", "kahan", "split24", "split32", "master")
STATE_CODES = tuple(BLOCKS)
HALVES = (torch.bfloat16, torch.float16)

# States of fewer elements are not worth a scale's memory, and biases and norms are sensitive.
MIN_QUANTIZED_NUMEL = 4096

SCALE = "scale"
CODES_VERSION = 1  # of what codes stand for (kernels/codecs.py); it is saved with them
_DTYPE = attrgetter("dtype")
_decode, _encode = torch_form(decode), torch_form(encode)
_codes_of, _value_of_code = torch_form(codes_of), torch_form(value_of_code)


class Codec(NamedTuple):
    """How one role is kept.

    Attributes:
        name: what kernels/codecs.py calls it.
        dtypes: of its parts.
        suffixes: of the parts beside the first: a state's name and this, or a parameter's this alone, name them.
        elements_per_item: how many an item of each part holds.
        random: whether it takes random bits.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    suffixes: tuple[str, ...] = ()
    elements_per_item: tuple[int, ...] = (1,)
    random: bool = False

    @property
    def block_size(self) -> int:
        """How many elements share a scale; 0 where there is none."""
        return self.elements_per_item[-1] if SCALE in self.suffixes else 0

    @property
    def exact(self) -> bool:
        """Whether what `encode` gives for the first part is a number of its dtype, so that nothing rounds it again."""
        return self.name not in ("plain", "master")

    @property
    def parts(self) -> list[tuple[torch.dtype, int]]:
        """The dtype of each part, and how many elements an item of it holds."""
        return list(zip(self.dtypes, self.elements_per_item, strict=True))

    @property
    def nbytes(self) -> float:
        """Bytes an element."""
        return sum(dtype.itemsize / count for dtype, count in self.parts)

    @property
    def nbytes_read(self) -> float:
        """Bytes an element that a step reads: what a master copy stands beside is only written."""
        return self.nbytes - (self.dtypes[0].itemsize if self.name == "master" else 0)


@cache
def plain(dtype: torch.dtype) -> Codec:
    """Values as they are, rounded to the nearest."""
    return Codec("plain", (dtype,))


@cache
def stochastic(dtype: torch.dtype) -> Codec:
    """Values rounded up or down so that the mean is exact."""
    return Codec(f"stochastic {_name(dtype)}", (dtype,), random=True)


@cache
def codes(state_dtype: str, nonnegative: bool) -> Codec:
    """Codes in blocks, ``"int8"`` or ``"int4"``; without a sign for what has none."""
    per_item, scale = {"int8": (1, torch.float32), "int4": (2, torch.bfloat16)}[state_dtype]
    name = f"u{state_dtype}" if nonnegative else state_dtype
    return Codec(name, (torch.int8, scale), (SCALE,), (per_item, BLOCKS[state_dtype]), random=state_dtype == "int4")


@cache
def with_residual(precision: str, dtype: torch.dtype) -> Codec:
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
RESIDUALS = {"master": "master", "compensation": "kahan", "residual_low": "split32", "residual": "split24"}


def parameter_codec(group: dict[str, Any], dtype: torch.dtype) -> Codec:
    """How a parameter of `dtype` is kept; one that is neither bfloat16 nor float16 as it is."""
    precision = group.get("param_precision", "storage")
    if dtype not in HALVES or precision == "storage":
        return plain(dtype)
    return stochastic(dtype) if precision == "stochastic" else with_residual(precision, dtype)


def state_codec(optimizer: Update, group: dict[str, Any], name: str, p: Tensor, current: Codec | None = None) -> Codec:
    """How a state of `p` is kept.

    Args:
        current: how it is kept now, which stays where the group says nothing else.
    """
    if name == AVERAGE:
        return average_codec(group, p)
    target: Any = group.get("state_dtype")
    if target in STATE_CODES:
        state = optimizer.declared[name]
        small = local(p).numel() < MIN_QUANTIZED_NUMEL or not local(p).is_contiguous() or is_wrapper(local(p))
        if small or not state.quantized:
            return plain(torch.promote_types(p.dtype, torch.float32))
        return codes(target, state.nonnegative)
    if target == torch.bfloat16 and not p.is_complex():
        return stochastic(target)
    return plain(target or (current.dtypes[0] if current is not None and current.name == "plain" else p.dtype))


def check_declared(cls: type[Update]) -> None:
    """Raise TypeError where what an optimizer declares as its states is none, or has a name that is taken."""
    rows = [("states", cls.states), ("kept_states", cls.kept_states), *(("states", v.states) for v in cls.variants)]
    for what, row in rows:
        if not isinstance(row, tuple) or not all(isinstance(state, State) for state in row):
            raise TypeError(
                f'{cls.__name__}.{what} is {row!r}; it must be a tuple of states, such as (State("exp_avg"),).'
            )
        for state in row:
            if isinstance(state.start, str) and state.start != "parameter":
                raise TypeError(
                    f"{cls.__name__} starts its state {state.name} with {state.start!r}. Give a number, "
                    '"parameter" for a copy of it, or a function of the parameter and its group.'
                )
    declared: dict[str, State] = {}
    for state in (state for variant in cls.variants for state in variant.states):
        if state != declared.setdefault(state.name, state):
            raise TypeError(
                f"{cls.__name__} has two states named {state.name}, {state} and {declared[state.name]}. Declare it "
                "alike in all variants, or rename one."
            )
    kept = [state.name for state in cls.kept_states]
    taken = {"step", AVERAGE, COUNT, WEIGHTS, *RESIDUALS, *(f"{name}_{SCALE}" for name in (*declared, *kept))}
    if both := sorted(taken & {*declared, *kept}):
        raise TypeError(f"{cls.__name__} has states {both}, names of what every optimizer may keep. Rename them.")
    if both := sorted({name for name in kept if name in declared or kept.count(name) > 1}):
        raise TypeError(f"{cls.__name__} declares its states {both} twice. Rename one of each.")


def coded_states(cls: type[Update]) -> list[State]:
    """Those of an optimizer's ``kept_states`` that are like their parameter, where a prologue keeps them."""
    if not any(variant.prologue for variant in cls.variants) or cls.first_kept is not Update.first_kept:
        return []
    return [state for state in cls.kept_states if not callable(state.start)]


@cache
def in_blocks(codec: Codec, size: int) -> Codec:
    """These codes in blocks of another size."""
    return codec._replace(elements_per_item=(codec.elements_per_item[0], size))


def part_names(codec: Codec, name: str | None) -> list[str]:
    """What the parts beside the first are called among the states; `name` is None for a parameter's."""
    if not codec.suffixes:  # most have none
        return []
    return [suffix if name is None else f"{name}_{suffix}" for suffix in codec.suffixes]


def read(codec: Codec, parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The value in the shape of `like`, in float32; what is kept as it is comes as it is."""
    if codec.name == "plain":
        return parts[0]
    if not codec.block_size:
        return _decode(tuple(map(wide, parts)), codec.name)  # type: ignore[no-any-return]
    scale = wide(parts[1]).view(-1, 1)
    value: Tensor = _decode((wide(parts[0]).view(len(scale), -1), scale), codec.name)
    return value.flatten()[: like.numel()].view(like.shape)


def write(codec: Codec, parts: Sequence[Tensor], value: Tensor, role: int = 0, random: Tensor | None = None) -> None:
    """Keep a value of the parts' shape.

    Args:
        role: the number of the result among the rule's.
        random: of kernels.codecs.hashed; None rounds what stochastic rounding would as half-way bits do.
    """
    if codec.name == "plain":
        parts[0].copy_(value)
        return
    value = value.to(torch.float32)
    if codec.block_size:
        blocks = len(parts[1])
        value = _padded(value, blocks * codec.block_size).view(blocks, codec.block_size)
        random = None if random is None else _padded(random, blocks * codec.block_size).view(blocks, codec.block_size)
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
    if codec.block_size:
        own = local(value)
        padded = math.ceil(own.numel() / codec.block_size) * codec.block_size
        parts = [torch.zeros(padded // n, dtype=dtype, device=own.device) for dtype, n in codec.parts]
        write(codec, parts, own)
        return parts
    if codec.name == "plain" and first is None:
        return [value if value.dtype == codec.dtypes[0] else value.to(codec.dtypes[0])]
    parts = [torch.empty_like(value, dtype=dtype, memory_format=torch.preserve_format) for dtype in codec.dtypes]
    if first is not None:
        parts[0] = first
    write(codec, list(map(local, parts)), local(value))
    return parts


def restore_scales(codec: Codec, parts: Sequence[Tensor], value: Tensor) -> None:
    """Where the values of a block were read of such codes, make the scale what it was: they are the same, bit for bit.

    `write` takes the scale from the largest value. That was rounded when it was multiplied by its scale; and a code of
    half a byte may have been rounded down from the largest one.
    """
    blocks = _padded(value.to(torch.float32), len(parts[1]) * codec.block_size).view(len(parts[1]), -1)
    for ulps in (-1, 1) if parts[1].dtype == torch.float32 else (0,):
        lost = (read(codec, parts, blocks) != blocks).any(1, keepdim=True)
        if ulps:
            scale = (parts[1].view(torch.int32) + ulps).view(torch.float32)
        else:
            second = torch.full_like(blocks[:, 0], 6.0 if codec.name == "int4" else 14.0)
            scale = (blocks.abs().amax(1) / _value_of_code(second, codec.name)).to(parts[1].dtype)
        own = [_codes_of(blocks, wide(scale).view(-1, 1), 0.5, codec.name).to(parts[0].dtype), scale]
        better = lost & (read(codec, own, blocks) == blocks).all(1, keepdim=True)
        for part, other in zip(parts, own, strict=True):
            rows = part.view(len(lost), -1)
            rows.copy_(torch.where(better, other.view(len(lost), -1), rows))


def check_precision(optimizer: Update, group: dict[str, Any]) -> None:
    """Raise ValueError where a group's ``state_dtype`` or ``param_precision`` is none of those there are, RuntimeError
    where its optimizer or its parameters cannot have it.
    """
    name, params = type(optimizer).__name__, group["params"]
    state_dtype, precision = group.get("state_dtype"), group.get("param_precision", "storage")
    if state_dtype not in (None, torch.float32, torch.bfloat16, *STATE_CODES):
        raise ValueError(
            f'Invalid state_dtype: {state_dtype!r}. Use None (the parameter\'s), torch.float32 or "float32", '
            f'torch.bfloat16 or "bfloat16", {" or ".join(map(_quoted, STATE_CODES))}.'
        )
    if precision not in PARAM_PRECISIONS:
        raise ValueError(
            f"Invalid param_precision: {precision!r}. Use one of {', '.join(map(_quoted, PARAM_PRECISIONS))}."
        )
    asked = f"state_dtype={_quoted(state_dtype)}"
    prologue = optimizer.running_variant(group).prologue
    if state_dtype is not None and prologue and optimizer.kept_states and not optimizer.coded_names:
        kept = ", ".join(state.name for state in optimizer.kept_states)
        raise RuntimeError(
            f"{name}: {asked} is for states like their parameter; {kept} are none, or kept in its dtype. "
            "Leave state_dtype out."
        )
    if state_dtype is not None and any(dtype.is_complex for dtype in set(map(_DTYPE, params))):
        raise RuntimeError(f"{name}: states of complex parameters are complex, not {asked}. Leave state_dtype out.")
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


def average_codec(group: dict[str, Any], p: Tensor) -> Codec:
    """How the average of a parameter is kept."""
    target = group.get("ema_dtype")
    if p.is_complex():
        return plain(p.dtype)
    if target == torch.bfloat16:
        return stochastic(target)
    return plain(target or torch.promote_types(p.dtype, torch.float32))


def _quoted(value: Any) -> str:
    return repr(value) if not isinstance(value, str) else f'"{value}"'


def keeps_plainly(group: dict[str, Any]) -> bool:
    """Whether a group's parameters and states are kept as they are."""
    return group.get("state_dtype") in (None, torch.float32) and group.get("param_precision", "storage") == "storage"
