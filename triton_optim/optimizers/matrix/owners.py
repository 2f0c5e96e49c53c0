"""Sharded matrices that ranks share out: each is sent to one rank, which iterates it and sends back what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...util.layout import gathered, is_sharded, local, parts_of, placed_as, split_over, with_local

# Elements that an owner gets at once. While it computes, the next ones are on their way.
LARGEST_ROUND = 1 << 26


def shared_out(
    params: Sequence[Tensor],
    costs: Sequence[float],
    fetch: Callable[[list[int]], list[Tensor]],
    compute: Callable[[list[Tensor]], list[Tensor]],
    sent_as: Callable[[Tensor], torch.dtype],
    everywhere: bool = False,
) -> list[Tensor]:
    """What comes of tensors that are sharded as parameters are, of which each is computed whole, on one rank.

    A rank sends each element that it has once, and gets back what came of it; if all were gathered everywhere it would
    get each of the whole, and compute all of them. So it is only where autograd records the step, and where no process
    group has just the ranks over which a parameter is split.

    Args:
        params: DTensors.
        costs: of the computation of each; ranks get as equal sums as can be.
        fetch: makes the tensors of some parameters, placed as these.
        compute: makes of some whole tensors, which may be overwritten, tensors of their shapes.
        sent_as: the dtype in which these are sent, of a tensor that was fetched.
        everywhere: whether every rank gets all that came of each, or its part.

    Returns:
        Of each what came of it: whole, or a DTensor placed as the parameter.
    """
    results: dict[int, Tensor] = {}
    arriving: list[tuple[Round, torch.dtype, Callable[[], list[Tensor]]]] = []
    returning: list[Callable[[], dict[int, Tensor]]] = []

    def turn() -> None:
        current, dtype, wholes = arriving.pop(0)
        made = [x.to(dtype) for x in compute(wholes())] if current.owned else []
        returning.append(current.give(made, dtype) if everywhere else current.send_back(made, dtype))
        if len(returning) > 1:
            results.update(returning.pop(0)())

    for following in () if torch.is_grad_enabled() else rounds(params, costs):
        arriving.append(following.send(fetch, sent_as))
        if len(arriving) > 1:
            turn()
    while arriving:
        turn()
    for wait in returning:
        results.update(wait())
    if not everywhere:
        results = {i: with_local(params[i], part) for i, part in results.items()}
    if left := [i for i in range(len(params)) if i not in results]:
        for i, whole in zip(left, compute(list(map(gathered, fetch(left)))), strict=True):
            results[i] = whole if everywhere else placed_as(params[i], whole)
    return [results[i] for i in range(len(params))]


def each_once(p: Tensor, batches: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What comes of square matrices that all ranks have whole: each is computed by one of those that have parts of a
    parameter, and given to all of them.

    Args:
        p: the parameter; of an ordinary one this process computes all, as it does one matrix alone.
        batches: ``(B, n, n)``.
        compute: makes of such a batch one like it.
    """
    several = sum(map(len, batches)) > 1
    ranks = ranks_of(p) if several and is_sharded(p) and not torch.is_grad_enabled() else None
    if ranks is None:
        return list(map(compute, batches))
    every = [(k, i) for k, batch in enumerate(batches) for i in range(len(batch))]
    every.sort(key=lambda one: -batches[one[0]].shape[-1])
    held: list[list[Held]] = [[] for _ in ranks.coordinates]
    loads = [0] * len(held)
    for number, (k, _) in enumerate(every):
        owner = loads.index(min(loads))
        loads[owner] += batches[k].shape[-1] ** 3
        held[owner].append(Held(number, batches[k].shape[1:], [], []))
    made: dict[int, Tensor] = {}
    for k, batch in enumerate(batches):
        if own := [each.number for each in held[ranks.here] if every[each.number][0] == k]:
            made.update(zip(own, compute(batch[[every[number][1] for number in own]]).unbind(), strict=True))
    wait = Round(ranks, held, local(p).device).give([made[each.number] for each in held[ranks.here]], batches[0].dtype)
    found = dict(zip(every, map(itemgetter(1), sorted(wait().items())), strict=True))
    return [torch.stack([found[k, i] for i in range(len(batch))]) for k, batch in enumerate(batches)]


class Ranks(NamedTuple):
    """Those that have the parts of a parameter.

    Attributes:
        group: in which they communicate.
        coordinates: where each is in the mesh, in the order of the group.
        here: the number of this rank in the group.
    """

    group: Any
    coordinates: tuple[tuple[int, ...], ...]
    here: int


def ranks_of(p: Tensor) -> Ranks | None:
    """The ranks over which a DTensor is split; None where it is whole, or no one process group has just these.

    Where one dimension of its mesh splits it they are that dimension's. Where several do, as of tensor parallel and
    FSDP together, they are all ranks, if the mesh has no others.
    """
    own: Any = p
    mesh = own.device_mesh
    dims = [dim for dim in split_over(p) if mesh.size(dim) > 1]
    if not dims:
        return None
    group = mesh.get_group(dims[0]) if len(dims) == 1 else dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    if prod(mesh.size(dim) for dim in dims) != len(ranks):
        return None
    known = coordinates_of(mesh)
    return Ranks(group, tuple(known[rank] for rank in ranks), ranks.index(dist.get_rank()))


@lru_cache
def coordinates_of(mesh: Any) -> dict[int, tuple[int, ...]]:
    """Where each rank of a mesh is in it."""
    ranks = mesh.mesh
    return {int(ranks[tuple(at)]): tuple(at) for at in torch.ones_like(ranks).nonzero().tolist()}


class Held(NamedTuple):
    """A parameter of a round.

    Attributes:
        number: its.
        shape: of the whole.
        parts: what the whole is indexed with to get the part of each rank.
        shapes: of these parts.
    """

    number: int
    shape: torch.Size
    parts: list[tuple[Any, ...]]
    shapes: list[tuple[int, ...]]


class Round:
    """Parameters that are sent at once, in one collective there and one back.

    Args:
        ranks: which have parts of them.
        held: the parameters that each rank owns.
        device: where they are.

    Attributes:
        owned: how many of them this rank owns.
    """

    def __init__(self, ranks: Ranks, held: list[list[Held]], device: torch.device) -> None:
        self._group, self._here, self._held, self._device = ranks.group, ranks.here, held, device
        self._owned = held[ranks.here]
        self.owned = len(self._owned)

    def send(
        self, fetch: Callable[[list[int]], list[Tensor]], sent_as: Callable[[Tensor], torch.dtype]
    ) -> tuple[Round, torch.dtype, Callable[[], list[Tensor]]]:
        """Send this rank's parts to the owners.

        Returns:
            The round, in which dtype what comes of them is sent back, and what waits for those that this rank owns.
        """
        own = iter(fetch([each.number for each in self._flat()]))
        leaving = [[local(next(own)) for _ in held] for held in self._held]
        first = next(x for xs in leaving for x in xs)
        coming = [[each.shapes[rank] for each in self._owned] for rank in range(len(self._held))]
        wait = self._exchange(leaving, coming, first.dtype)

        def wholes() -> list[Tensor]:
            found = [first.new_empty(each.shape) for each in self._owned]
            for rank, parts in enumerate(wait()):
                for x, each, part in zip(found, self._owned, parts, strict=True):
                    x[each.parts[rank]] = part
            return found

        return self, sent_as(first), wholes

    def send_back(self, updates: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], dict[int, Tensor]]:
        """Send every rank its part of what came of those that this rank owns.

        Returns:
            What waits for this rank's parts, by the number of the parameter.
        """
        leaving = [
            [update[each.parts[rank]] for each, update in zip(self._owned, updates, strict=True)]
            for rank in range(len(self._held))
        ]
        coming = [[each.shapes[self._here] for each in held] for held in self._held]
        wait = self._exchange(leaving, coming, dtype)

        def parts() -> dict[int, Tensor]:
            arrived = (part for own in wait() for part in own)
            return {each.number: part for each, part in zip(self._flat(), arrived, strict=True)}

        return parts

    def give(self, updates: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], dict[int, Tensor]]:
        """Send every rank all that came of those that this rank owns.

        Returns:
            What waits for the whole ones of the round, by the number of the parameter.
        """
        sizes = [[each.shape.numel() for each in held] for held in self._held]
        longest = max(map(sum, sizes))  # a gather is of one size
        packed = torch.zeros(longest, dtype=dtype, device=self._device)
        for place, update in zip(
            torch.split(packed[: sum(sizes[self._here])], sizes[self._here]), updates, strict=True
        ):
            place.copy_(update.reshape(-1))
        arrived = packed.new_empty(len(sizes) * longest)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13's name
        work = gather(arrived, packed, group=self._group, async_op=True)

        def wholes() -> dict[int, Tensor]:
            work.wait()
            found: dict[int, Tensor] = {}
            for held, own, part in zip(self._held, sizes, torch.split(arrived, longest), strict=True):
                pieces = torch.split(part[: sum(own)], own) if own else ()
                found.update((each.number, x.view(each.shape)) for each, x in zip(held, pieces, strict=True))
            return found

        return wholes

    def _flat(self) -> Iterator[Held]:
        return (each for held in self._held for each in held)

    def _exchange(
        self, leaving: list[list[Tensor]], coming: list[list[Any]], dtype: torch.dtype
    ) -> Callable[[], list[list[Tensor]]]:
        """Send each rank its tensors. What is returned waits for those that each rank sent here, of these shapes."""
        flat = [x.reshape(-1) for own in leaving for x in own]
        packed = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self._device)
        sizes = [[prod(shape) for shape in own] for own in coming]
        received = list(map(sum, sizes))
        sent = [sum(x.numel() for x in own) for own in leaving]
        arrived = packed.new_empty(sum(received))
        work = dist.all_to_all_single(arrived, packed, received, sent, group=self._group, async_op=True)

        def wait() -> list[list[Tensor]]:
            nonlocal packed
            work.wait()
            packed = arrived  # what was sent need not be held any longer
            return [
                [x.view(shape) for x, shape in zip(torch.split(part, own), shapes, strict=True)] if own else []
                for part, own, shapes in zip(torch.split(arrived, received), sizes, coming, strict=True)
            ]

        return wait


def rounds(params: Sequence[Tensor], costs: Sequence[float]) -> Iterator[Round]:
    """The rounds in which sharded parameters are shared out, the same on every rank: see :func:`shared_out`."""
    alike: dict[Any, tuple[Ranks, list[int]]] = {}
    for i, p in enumerate(params):
        if (ranks := ranks_of(p)) is not None:
            key = (ranks.group, ranks.coordinates, p.dtype, p.device)
            alike.setdefault(key, (ranks, []))[1].append(i)
    for ranks, indices in alike.values():
        loads = [0.0] * len(ranks.coordinates)
        # The dearest first, so that what is left over is small; those of one shape follow each other.
        indices.sort(key=lambda i: (-costs[i], tuple(params[i].shape), i))
        for own in cut(indices, params, LARGEST_ROUND * len(loads)):
            held: list[list[Held]] = [[] for _ in loads]
            for i in own:
                owner = min(range(len(loads)), key=loads.__getitem__)
                loads[owner] += costs[i]
                held[owner].append(Held(i, params[i].shape, *parts_of(params[i], ranks.coordinates)))
            yield Round(ranks, held, params[own[0]].device)


def cut(indices: Sequence[int], params: Sequence[Tensor], largest: int) -> Iterator[list[int]]:
    """The list in parts of at most `largest` elements, or one parameter."""
    own: list[int] = []
    elements = 0
    for i in indices:
        if own and elements + params[i].numel() > largest:
            yield own
            own, elements = [], 0
        own.append(i)
        elements += params[i].numel()
    if own:
        yield own
