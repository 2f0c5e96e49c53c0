"""The update of some parameters, or pieces of them, compiled by torch.compile."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from ...kernels.codecs import decode, encode
from ...kernels.language import results, torch_form
from ...precision.averaging import average_of
from ...precision.codecs import Codec, wide
from ...precision.random_bits import bits_of_elements
from .vector_code import vector_code

_decode, _encode = torch_form(decode), torch_form(encode)


# Tensors a call updates. More take longer to compile. Fewer make more calls, which cost host time; and between calls,
# unlike between the loops of one, the worker threads fall asleep.
SLOTS = 4


# Elements from which on the threads together were faster than one, measured on two cores.
PARALLEL_FROM = 16 * 1024


# Example length for the compiler: long enough that it writes a parallel loop.
EXAMPLE = 1 << 20


LONGEST = 1 << 30  # Inductor indexes by 32 bits on a GPU


Body = Callable[[list[Tensor], Tensor], None]  # the tensors of a slot, and the row


def update(
    rule: Callable[..., Any],
    scalars: Any,
    codecs: tuple[Codec, ...],
    compute: torch.dtype,
    scaled: bool,
    averaged: bool,
) -> Body:
    """What torch.compile compiles for each slot: the rule on flat tensors, in place.

    A slot's tensors are the parts of p, the gradient, the parts of the states; then, for each state that is kept in
    codes, where its new value waits for `encode_codes`; then what the random bits depend on, where there are any. Where
    states are quantized, all of them have a row for each block. With `averaged` the last state is the average of
    the parameter, and the row ends with the weight of a new value.
    """
    coded = [codec for codec in codecs if codec.block_size]
    random = any(codec.random for codec in codecs)

    def body(own: list[Tensor], row: Tensor) -> None:
        factor, *h = row.unbind()
        parts, taken = [], 0
        for role, codec in enumerate(codecs):
            parts.append(own[taken : taken + len(codec.dtypes)])
            taken += len(codec.dtypes)
            if role == 0:
                g, taken = own[taken], taken + 1
        waiting = iter(own[taken : taken + len(coded)])
        values = [_decode(tuple(map(wide, p)), c.name) for c, p in zip(codecs, parts, strict=True)]
        values = [t.to(compute) for t in (values[0], g, *values[1:])]
        if scaled:
            values[1] = values[1] * factor
        bits = random_of(own[-1], values[0]) if random else None
        average = values.pop() if averaged else None
        new = results(rule, values, scalars(*h[: len(scalars._fields)]))
        for role, codec in enumerate(codecs):
            value = new[role]
            value = value if codec.name == "plain" else value.to(torch.float32)
            if codec.block_size:
                next(waiting).copy_(value)
            else:
                encoded = _encode(value, bits, role, codec.name)
                stored = []
                for number, kept in enumerate(encoded):
                    rough = parts[role][number].dtype == torch.bfloat16 and (number > 0 or not codec.exact)
                    stored.append(rounded(kept) if rough else kept)
                    parts[role][number].copy_(stored[-1])
                if averaged and role == 0:
                    weighed = _decode(tuple(map(as_stored, stored, codec.dtypes)), codec.name).to(compute)
                    new.append(average_of(average, weighed, h[-1]))

    return body


def as_stored(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A part as it would be read again."""
    if dtype == torch.int8:
        return ((part.to(torch.int32) << 24) >> 24).to(torch.int32)
    return part.to(dtype).to(torch.float32) if dtype == torch.float16 else part


def rounded(value: Tensor) -> Tensor:
    """To the nearest bfloat16 number, ties to even, in float32: all that `vector_code` leaves to be done."""
    value = value.to(torch.float32)
    bits = value.view(torch.int32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    return torch.where(value == value, nearest, value)  # NaN


def encode_codes(codecs: tuple[Codec, ...]) -> Body:
    """The second half. A slot has the parts and the new value of each state that is quantized; then what the random
    bits depend on, where there are any. Apart from the first, each is one loop without anything between.
    """
    random = any(codec.random for codec in codecs)
    roles = [(role, codec) for role, codec in enumerate(codecs) if codec.block_size]

    def body(own: list[Tensor], row: Tensor) -> None:
        bits = random_of(own[-1], own[2]) if random else None
        for k, (role, codec) in enumerate(roles):
            *parts, value = own[3 * k : 3 * k + 3]
            taken = _encode(value, value if bits is None else bits, role, codec.name)
            for part, kept in zip(parts, taken, strict=True):
                part.copy_(kept)

    return body


def random_of(key: Tensor, like: Tensor) -> Tensor:
    """The random bits of a slot. An index of 32 bits is enough: a piece has no more."""
    index = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    return bits_of_elements(key, index.view(like.shape))


class Graph:
    """A body compiled for slots of certain dtypes and any length, with or without parallel loops.

    Dynamo traces it once, with the lengths as the dynamic sizes. Afterwards the code that Inductor made is called
    directly: Dynamo's guards check what a bucket has checked already, and they and AOTAutograd's layers cost several
    times the rest of a call.

    Args:
        name: what Dynamo is to call it.
        body: what is done with the tensors of a slot.
        slot: dtype and row of each tensor of a slot: how many elements it has for one of its length, as a shape.
        key: whether a slot ends with what its random bits depend on.
        row: what the scalars come as.
    """

    def __init__(
        self,
        name: str,
        body: Body,
        slot: list[tuple[torch.dtype, tuple[int, ...]]],
        key: bool,
        row: Tensor,
        example: int,
        parallel: bool,
    ) -> None:
        device = row.device
        self.roles = len(slot) + key
        self._code: Callable[[list[Any]], Any] | None = None
        self._order: list[int] = []
        self._empty = [torch.empty(0, *shape, dtype=dtype, device=device) for dtype, shape in slot]
        self._empty += [torch.zeros(4, dtype=torch.int32, device=device)] * key
        roles = self.roles

        def call(row: Tensor, *tensors: Tensor) -> None:
            for start in range(0, len(tensors), roles):
                body(list(tensors[start : start + roles]), row)

        # A code object of its own: Dynamo counts recompilations by code object and stops at 8.
        call = types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
        # A gradient of any shape can be passed as it is: of the tensors, only the addresses are taken.
        # Inductor's cache of graphs first hashes all of torch's source, which takes longer than it saves here.
        self._config = {"size_asserts": False, "fx_graph_cache": False} | ({} if parallel else {"cpp.threads": 1})
        traced = torch.compile(call, fullgraph=True, backend=self._backend)
        # Lengths that differ, else the slots would be taken to be equally long.
        lengths = [example + 16 * slot for slot in range(SLOTS)]
        tensors: list[Tensor] = []
        for n in lengths:
            own = [torch.zeros(n, *shape, dtype=dtype, device=device) for dtype, shape in slot]
            for t in own:
                torch._dynamo.mark_dynamic(t, 0)
                for dim in range(1, t.dim()):
                    torch._dynamo.mark_static(t, dim)
            tensors += own
            if key:
                tensors.append(torch.zeros(4, dtype=torch.int32, device=device))
                torch._dynamo.mark_static(tensors[-1], 0)  # though another graph had a flat tensor in this place
        self._example = [*tensors, *lengths, row]
        with torch.no_grad(), torch.compiler.set_stance("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses what torch deprecates
            warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")  # int4 scales of a fp16 model; each is widened
            traced(row, *tensors)
        del self._example
        if self._code is None:
            raise RuntimeError("torch.compile is switched off (TORCHDYNAMO_DISABLE or torch.compiler.set_stance)")

    def _backend(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        try:
            with trusted_vector_isa(), vector_code():
                return self._compile(copy.deepcopy(graph), example)
        except Exception:  # perhaps a compiler older than the processor: have the instructions tested
            return self._compile(graph, example)

    def _compile(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        # A hit in AOTAutograd's cache would leave `_inner` out.
        with config.patch(enable_autograd_cache=False):
            code: Any = compile_fx(graph, example, inner_compile=cast(Any, self._inner), config_patches=self._config)
        return cast(Callable[..., Any], code)

    def _inner(self, graph: torch.fx.GraphModule, example: Any, **options: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx_inner

        code: Any = compile_fx_inner(graph, example, **options)

        def first_call(arguments: list[Any]) -> Any:
            # Where each of the graph's arguments stands among ours: the tensors, then the lengths, then the row.
            positions = {x if isinstance(x, int) else id(x): i for i, x in enumerate(self._example)}
            self._order = [positions[id(x) if isinstance(x, Tensor) else int(x)] for x in arguments]
            self._code = getattr(code, "current_callable", code)
            return code(arguments)

        first_call._boxed_call = True  # type: ignore[attr-defined]  # it takes its arguments as a list
        return first_call

    def __call__(self, row: Tensor, tensors: list[Tensor]) -> None:
        """Run the slots that `tensors` are."""
        assert self._code is not None
        step = SLOTS * self.roles
        for start in range(0, len(tensors), step):
            arguments: list[Any] = tensors[start : start + step]
            arguments += self._empty * (SLOTS - len(arguments) // self.roles)
            arguments += [len(t) if t.dim() else t.numel() for t in arguments[:: self.roles]]
            arguments.append(row)
            self._code([arguments[i] for i in self._order])


@contextmanager
def trusted_vector_isa() -> Iterator[None]:
    """Take the processor's word for its vector instructions.

    Inductor builds and loads a test library for each kind before it first compiles, which takes three times as long as
    compiling the update. A compiler that does not know them fails in the update, too, which is then compiled again.
    """
    from torch._inductor import config, cpu_vec_isa

    kinds = cpu_vec_isa.valid_vec_isa_list
    if not hasattr(kinds, "cache_clear") or kinds.cache_info().currsize or config.cpp.vec_isa_ok is not None:
        yield
        return
    try:
        with config.patch({"cpp.vec_isa_ok": True}):
            yield
    finally:
        kinds.cache_clear()  # what others compile is tested as ever


@cache
def graph_for(
    rule: Any,
    scalars: Any,
    codecs: tuple[Codec, ...],
    gradient: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
    scaled: bool,
    averaged: bool,
    parallel: bool,
) -> Graph:
    """The compiled graph of an update, one for a process. A failure is not remembered: its cause may pass.

    With `scaled` the gradient is multiplied by the row's factor; without, that multiplication is saved: on a CPU an
    update is nearly as much arithmetic as memory traffic.
    """
    block_size = max(codec.block_size for codec in codecs)
    slot: list[tuple[torch.dtype, tuple[int, ...]]] = []
    for role, codec in enumerate(codecs):
        slot += [(dtype, shape_of(per_item, block_size)) for dtype, per_item in codec.parts]
        slot += [(gradient, shape_of(1, block_size))] * (role == 0)
    slot += [(torch.float32, shape_of(1, block_size))] * sum(codec.block_size > 0 for codec in codecs)
    body = update(torch_form(rule), scalars, codecs, compute, scaled, averaged)
    row = torch.zeros(1 + len(scalars._fields) + averaged, dtype=compute, device=device)
    random = any(codec.random for codec in codecs)
    return Graph(rule.__name__, body, slot, random, row, EXAMPLE // max(block_size, 1), parallel)


@cache
def codes_graph_for(codecs: tuple[Codec, ...], device: torch.device, parallel: bool) -> Graph:
    """The compiled graph of :func:`encode_codes`."""
    block_size = max(codec.block_size for codec in codecs)
    slot: list[tuple[torch.dtype, tuple[int, ...]]] = []
    for codec in codecs:
        if codec.block_size:
            slot += [(dtype, shape_of(per_item, block_size)) for dtype, per_item in codec.parts]
            slot.append((torch.float32, shape_of(1, block_size)))
    random = any(codec.random for codec in codecs)
    return Graph(
        "codes", encode_codes(codecs), slot, random, torch.zeros(1, device=device), EXAMPLE // block_size, parallel
    )


def shape_of(per_item: int, block_size: int) -> tuple[int, ...]:
    """What an element of length stands for, in items of so many elements: one, or the row of a block."""
    return (block_size // per_item,) if block_size else ()
