"""The compiled backend: the rule compiled by torch.compile for flat tensors of any length, once for each dtype.

A call updates several tensors. There are two graphs: one for large tensors, whose loops run on all threads, and one for
small tensors, which the calling thread updates alone.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .bucket import Bucket, Key, Member, Row, row_for, table_of
from .kernels.language import apply, torch_form
from .layout import flat, local
from .rounding import rounding

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer


# Tensors a call updates. More take longer to compile. Fewer make more calls, which cost host time; and between calls,
# unlike between the loops of one, the worker threads fall asleep.
SLOTS = 4

# Elements from which on the threads together were faster than one, measured on two cores.
PARALLEL_FROM = 16 * 1024

# Example length for the compiler: long enough that it writes a parallel loop.
EXAMPLE = 1 << 20

LONGEST = 1 << 30


def update(
    rule: Callable[..., Any],
    scalars: Any,
    compute: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    rounded: tuple[bool, ...],
    scaled: bool,
    row: Tensor,
    *tensors: Tensor,
) -> None:
    """What torch.compile compiles: the rule on the flat tensors of all slots, in place.

    Where something is rounded, a slot's tensors end with what its random bits depend on.
    """
    factor, *h = row.unbind()
    roles = len(dtypes)
    for start in range(0, len(tensors), roles + bool(rounded)):
        own = list(tensors[start : start + roles])
        values = [t.to(compute) for t in own]
        if scaled:
            values[1] = values[1] * factor
        if not rounded:
            apply(rule, own, values, scalars(*h))
            continue
        index = torch.arange(own[0].numel(), device=own[0].device)
        apply(rule, own, values, scalars(*h), rounding(rounded, tensors[start + roles], index, dtypes))


class Graph:
    """The rule compiled for one scalar type, one dtype a role, with or without parallel loops.

    Dynamo traces it once, with the lengths as the dynamic sizes. Afterwards the code that Inductor made is called
    directly: Dynamo's guards check what a bucket has checked already, and they and AOTAutograd's layers cost several
    times the rest of a call.
    """

    def __init__(
        self,
        rule: Any,
        scalars: Any,
        dtypes: tuple[torch.dtype, ...],
        compute: torch.dtype,
        device: torch.device,
        scaled: bool,
        rounded: tuple[bool, ...],
        parallel: bool,
    ) -> None:
        self.roles = len(dtypes) + bool(rounded)
        self._code: Callable[[list[Any]], Any] | None = None
        self._order: list[int] = []
        self._empty = [torch.empty(0, dtype=dtype, device=device) for dtype in dtypes]
        self._empty += [torch.zeros(2, dtype=torch.int64, device=device)] * bool(rounded)
        # A code object of its own: Dynamo counts recompilations by code object and stops at 8.
        own = types.FunctionType(update.__code__.replace(co_name=rule.__name__), update.__globals__, rule.__name__)
        form = torch_form(rule)

        def call(row: Tensor, *tensors: Tensor) -> None:
            own(form, scalars, compute, dtypes, rounded, scaled, row, *tensors)

        call = types.FunctionType(call.__code__.replace(), call.__globals__, rule.__name__, None, call.__closure__)
        # A gradient of any shape can be passed as it is: of the tensors, only the addresses are taken.
        # Inductor's cache of graphs first hashes all of torch's source, which takes longer than it saves here.
        self._config = {"size_asserts": False, "fx_graph_cache": False} | ({} if parallel else {"cpp.threads": 1})
        traced = torch.compile(call, fullgraph=True, backend=self._backend)
        # Lengths that differ, else the slots would be taken to be equally long.
        lengths = [EXAMPLE + 16 * slot for slot in range(SLOTS)]
        tensors: list[Tensor] = []
        for n in lengths:
            flats = [torch.zeros(n, dtype=dtype, device=device) for dtype in dtypes]
            for t in flats:
                torch._dynamo.mark_dynamic(t, 0)
            tensors += flats
            if rounded:
                tensors.append(torch.zeros(2, dtype=torch.int64, device=device))
                torch._dynamo.mark_static(tensors[-1], 0)  # though another graph had a flat tensor in this place
        row = torch.zeros(1 + len(scalars._fields), dtype=compute, device=device)
        self._example = [*tensors, *lengths, row]
        with torch.no_grad(), torch.compiler.set_stance("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses what torch deprecates
            traced(row, *tensors)
        del self._example
        if self._code is None:
            raise RuntimeError("torch.compile is switched off (TORCHDYNAMO_DISABLE or torch.compiler.set_stance)")

    def _backend(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        try:
            with trusted_vector_isa():
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
            places = {x if isinstance(x, int) else id(x): i for i, x in enumerate(self._example)}
            self._order = [places[id(x) if isinstance(x, Tensor) else int(x)] for x in arguments]
            self._code = getattr(code, "current_callable", code)
            return code(arguments)

        first_call._boxed_call = True  # type: ignore[attr-defined]  # it takes its arguments as a list
        return first_call

    def __call__(self, row: Tensor, tensors: list[Tensor]) -> None:
        """Update every `roles` of the tensors by the scalars of `row`."""
        assert self._code is not None
        step = SLOTS * self.roles
        for start in range(0, len(tensors), step):
            arguments: list[Any] = tensors[start : start + step]
            arguments += self._empty * (SLOTS - len(arguments) // self.roles)
            arguments += [t.numel() for t in arguments[:: self.roles]]
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
    dtypes: tuple[torch.dtype, ...],
    compute: torch.dtype,
    device: torch.device,
    scaled: bool,
    rounded: tuple[bool, ...],
    parallel: bool,
) -> Graph:
    """The compiled graph, one for a process. A failure is not remembered: its cause may pass.

    With `scaled` the gradient is multiplied by the row's factor; without, that multiplication is saved: on a CPU an
    update is nearly as much arithmetic as memory traffic.
    """
    return Graph(rule, scalars, dtypes, compute, device, scaled, rounded, parallel)


class CompiledBucket(Bucket):
    def __init__(self, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> None:
        super().__init__(optimizer, key, members)
        self.graphs = self.prepare(optimizer, key, members)
        self.flats = [[flat(local(m.p)), *map(flat, self.states_of(m))] for m in members]
        self.parallel = [numel >= PARALLEL_FROM for numel in self.numels]

    @classmethod
    def prepare(cls, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> dict[bool, Graph]:
        super().prepare(optimizer, key, members)
        groups = [group for group in optimizer.param_groups if optimizer.variant(group) == key.variant]
        rows = [row_for(optimizer, group, 1) for group in groups]
        scaled = any(row.factor != 1 for row in rows)
        what: Any = (key.variant.rule, type(rows[0].h), key.dtypes, key.compute, key.device, scaled, key.rounded)
        sizes = {local(m.p).numel() >= PARALLEL_FROM for m in members}
        return {parallel: graph_for(*what, parallel) for parallel in sizes}

    @classmethod
    def launches(cls, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> int:
        large = sum(local(m.p).numel() >= PARALLEL_FROM for m in members)
        return -(-large // SLOTS) - (large - len(members)) // SLOTS

    def run(self, rows: list[Row | None]) -> None:
        table = table_of(rows, self.key.compute, self.key.device).unbind()
        calls: dict[tuple[int, bool], list[Tensor]] = {}
        keys: list[list[Tensor]] = [[]] * len(self.members)
        if self.key.rounded:
            keys = [[own] for own in self.random_keys(rows).unbind()]
        each = zip(self.gradients, self.flats, self.numels, self.row_of, self.parallel, keys, strict=True)
        for g, (value, *states), numel, row, parallel, key in each:
            if g is None:
                continue
            tensors = calls.setdefault((row, parallel), [])
            if numel <= LONGEST:
                tensors += (value, g, *states, *key)
                continue
            # Inductor indexes by 32 bits on a GPU.
            for k, piece in enumerate(zip(*(torch.split(t, LONGEST) for t in (value, flat(g), *states)), strict=True)):
                tensors += (*piece, *(own + torch.tensor([0, k * LONGEST], device=own.device) for own in key))
        for (row, parallel), tensors in calls.items():
            self.graphs[parallel](table[row], tensors)
        self.mark_written()
