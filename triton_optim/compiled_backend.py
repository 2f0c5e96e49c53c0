"""The compiled backend: the rule compiled by torch.compile for flat tensors of any length, once for each dtype.

A large tensor is one call. Small ones are packed: their states live in one flat buffer, their parameters and gradients
are gathered into it for one call and the parameters scattered back, which costs less than a call for each.
"""

from __future__ import annotations

import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bucket import Bucket, Key, Member, Row, row_for, table_of
from .kernels.language import apply, torch_form
from .layout import flat, is_sharded, local

if TYPE_CHECKING:
    from .optimizer import RuleOptimizer

# Measured on two cores: below this many elements gathering and scattering costs less than a call, and a pack of this
# size stays in the cache.
PACK_BELOW = 16 * 1024
PACK_LIMIT = 256 * 1024

LONGEST = 1 << 30

# Example length for the compiler: long enough that it writes a parallel loop.
EXAMPLE = 1 << 20


def update(
    rule: Callable[..., Any], scalars: Any, compute: torch.dtype, scaled: bool, row: Tensor, *tensors: Tensor
) -> None:
    """What torch.compile compiles: the rule on whole flat tensors, writing parameter and states in place."""
    factor, *h = row.unbind()
    values = [t.to(compute) for t in tensors]
    if scaled:
        values[1] = values[1] * factor
    apply(rule, list(tensors), values, scalars(*h))


class Graph:
    """The rule compiled for one scalar type and one dtype a role.

    Dynamo traces it once, with the length as the one dynamic size. Afterwards the compiled code is called directly:
    Dynamo's guards check what a bucket has checked already, and cost several times the rest of a call.
    """

    def __init__(
        self,
        rule: Any,
        scalars: Any,
        dtypes: tuple[torch.dtype, ...],
        compute: torch.dtype,
        device: torch.device,
        scaled: bool,
    ) -> None:
        self._code: Callable[..., Any] | None = None
        self._order: list[int] = []
        # A code object of its own: Dynamo counts recompilations by code object and stops at 8.
        own = types.FunctionType(update.__code__.replace(co_name=rule.__name__), update.__globals__, rule.__name__)
        form = torch_form(rule)

        def call(row: Tensor, *tensors: Tensor) -> None:
            own(form, scalars, compute, scaled, row, *tensors)

        call = types.FunctionType(call.__code__.replace(), call.__globals__, rule.__name__, None, call.__closure__)
        traced = torch.compile(call, fullgraph=True, backend=self._backend)
        tensors = [torch.zeros(EXAMPLE, dtype=dtype, device=device) for dtype in dtypes]
        for t in tensors:
            torch._dynamo.mark_dynamic(t, 0)
        row = torch.zeros(1 + len(scalars._fields), dtype=compute, device=device)
        self._example = [row, *tensors]
        with torch.no_grad(), torch.compiler.set_stance("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses what torch deprecates
            traced(row, *tensors)
        del self._example
        if self._code is None:
            raise RuntimeError("torch.compile is switched off (TORCHDYNAMO_DISABLE or torch.compiler.set_stance)")

    def _backend(self, graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        code: Any = compile_fx(graph, example)

        def first_call(*arguments: Any) -> Any:
            # Where each of our arguments stands among the graph's; the length stands as itself.
            places = {id(t): i for i, t in enumerate(self._example)}
            self._order = [places[id(x)] if isinstance(x, Tensor) else -1 for x in arguments]
            self._code = code
            return code(*arguments)

        return first_call

    def __call__(self, *arguments: Tensor) -> None:
        assert self._code is not None
        length = arguments[1].numel()
        self._code(*[length if i < 0 else arguments[i] for i in self._order])


@cache
def graph_for(
    rule: Any,
    scalars: Any,
    dtypes: tuple[torch.dtype, ...],
    compute: torch.dtype,
    device: torch.device,
    scaled: bool,
) -> Graph:
    """The compiled graph, one for a process. A failure is not remembered: its cause may pass.

    With `scaled` the gradient is multiplied by the row's factor; without, that multiplication is saved: on a CPU an
    update is nearly as much arithmetic as memory traffic.
    """
    return Graph(rule, scalars, dtypes, compute, device, scaled)


class Pack:
    """Small members whose states lie one after the other in flat buffers."""

    def __init__(self, places: list[int], values: list[Tensor], states: list[Tensor], is_flat: bool) -> None:
        self.places, self.values, self.states = places, values, states
        self.lengths = [v.numel() for v in values]
        self.is_flat = is_flat
        self.numel = sum(self.lengths)


def packs_of(members: list[Member]) -> list[list[int]]:
    """Places of the members that are packed, a list for each pack: small ones of one group and step count."""
    waiting: dict[tuple[int, int], list[int]] = {}
    for i, m in enumerate(members):
        if m.p.numel() < PACK_BELOW and not is_sharded(m.p):
            waiting.setdefault((m.group, m.count), []).append(i)
    packs = []
    for places in waiting.values():
        ends = itertools.accumulate(members[i].p.numel() for i in places)
        for _, run in itertools.groupby(zip(places, ends, strict=True), lambda pair: (pair[1] - 1) // PACK_LIMIT):
            packs.append([i for i, _ in run])
    return [places for places in packs if len(places) > 1]


class CompiledBucket(Bucket):
    def __init__(self, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> None:
        self.packs: list[Pack] = []
        self._graphs = self.graphs(optimizer, key)
        super().__init__(optimizer, key, members)
        packed = {i for pack in self.packs for i in pack.places}
        self.alone = [i for i in range(len(members)) if i not in packed]
        self.flats = [[flat(local(m.p)), *map(flat, self.states_of(m))] for m in members]
        room = max((pack.numel for pack in self.packs), default=0)
        self.gathered = [torch.empty(room, dtype=dtype, device=key.device) for dtype in key.dtypes[:2]]
        self.scattered = [torch.split(self.gathered[0][: pack.numel], pack.lengths) for pack in self.packs]

    @classmethod
    def prepare(cls, optimizer: RuleOptimizer, key: Key) -> None:
        super().prepare(optimizer, key)
        cls.graphs(optimizer, key)

    @classmethod
    def graphs(cls, optimizer: RuleOptimizer, key: Key) -> dict[bool, Graph]:
        """What runs the bucket: by whether the gradient is scaled."""
        groups = [group for group in optimizer.param_groups if optimizer.variant(group) == key.variant]
        rows = [row_for(optimizer, group, 1) for group in groups]
        scalars: Any = type(rows[0].h)
        return {
            scaled: graph_for(key.variant.rule, scalars, key.dtypes, key.compute, key.device, scaled)
            for scaled in {row.factor != 1 for row in rows}
        }

    @classmethod
    def launches(cls, optimizer: RuleOptimizer, key: Key, members: list[Member]) -> int:
        packs = packs_of(members)
        # A pack: gather parameters, gather gradients, update, scatter.
        return len(members) - sum(map(len, packs)) + 4 * len(packs)

    def place_states(self, values: list[Tensor]) -> None:
        super().place_states(values)
        for places in packs_of(self.members):
            self._pack(places, values)

    def _pack(self, places: list[int], values: list[Tensor]) -> None:
        numel = sum(values[i].numel() for i in places)
        buffers = []
        for role, name in enumerate(self.key.variant.state_names, start=2):
            buffer = torch.empty(numel, dtype=self.key.dtypes[role], device=self.key.device)
            start = 0
            for i in places:
                m, value = self.members[i], values[i]
                own = buffer.as_strided(value.shape, value.stride(), start)
                m.state[name] = own.copy_(m.state[name])
                start += value.numel()
            buffers.append(buffer)
        is_flat = all(values[i].dim() == 1 for i in places)
        self.packs.append(Pack(places, [flat(values[i]) for i in places], buffers, is_flat))

    def run(self, rows: list[Row | None]) -> None:
        table = table_of(rows, self.key.compute, self.key.device).unbind()
        calls = [
            None if row is None else partial(self._graphs[row.factor != 1], scalars)
            for row, scalars in zip(rows, table, strict=True)
        ]
        for i in self.alone:
            self._run_alone(calls, i)
        for pack, scattered in zip(self.packs, self.scattered, strict=True):
            gradients: list[Any] = [self.gradients[i] for i in pack.places]
            together = self.complete and len(self.cohorts) == 1
            if not together and (any(g is None for g in gradients) or len({self.row_of[i] for i in pack.places}) > 1):
                for i in pack.places:
                    self._run_alone(calls, i)
                continue
            call = calls[self.row_of[pack.places[0]]]
            assert call is not None
            p, g = (buffer[: pack.numel] for buffer in self.gathered)
            torch.cat(pack.values, out=p)
            torch.cat(gradients if pack.is_flat else list(map(flat, gradients)), out=g)
            call(p, g, *pack.states)
            torch._foreach_copy_(pack.values, scattered)

    def _run_alone(self, calls: Sequence[Callable[..., None] | None], i: int) -> None:
        g, call = self.gradients[i], calls[self.row_of[i]]
        if g is None or call is None:
            return
        value, *states = self.flats[i]
        if self.numels[i] <= LONGEST:
            call(value, flat(g), *states)
            return
        # Inductor indexes by 32 bits on a GPU.
        for piece in zip(*(torch.split(t, LONGEST) for t in (value, flat(g), *states)), strict=True):
            call(*piece)
