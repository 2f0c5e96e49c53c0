"""The compiled backend: the rule compiled by torch.compile for flat tensors of any length, once for each dtype.

A call updates several tensors. There are two graphs: one for large tensors, whose loops run on all threads, and one for
small tensors, which the calling thread updates alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...buckets.bucket import Bucket
from ...buckets.key import Key, Piece
from ...buckets.slots import ParamSlot
from ...buckets.step_scalars import StepScalars, first_scalars, table_of
from ...spec import Update
from ...util.layout import flat, local
from ..update import measure
from ..update import update as run_eagerly
from . import graph
from .graph import Graph

# Elements of a piece of what is quantized: what the rule returns waits in memory for the scale of its block, 4 MB
# for two states. Smaller pieces make more calls, whose threads wait for each other.
PIECE = 1 << 17


def calls_of(numels: Sequence[int], block_size: int) -> int:
    """How many calls update parameters of so many elements.

    Args:
        block_size: elements that share a scale; 0 where nothing is quantized.
    """
    longest = PIECE if block_size else graph.LONGEST
    large = sum(-(-numel // longest) for numel in numels if numel >= graph.PARALLEL_FROM)
    small = sum(numel < graph.PARALLEL_FROM for numel in numels)
    return (1 + (block_size > 0)) * (-(-large // graph.SLOTS) - -small // graph.SLOTS)


class CompiledBucket(Bucket):
    def __init__(self, optimizer: Update, key: Key, slots: list[ParamSlot]) -> None:
        super().__init__(optimizer, key, slots, PIECE if key.block_size else graph.LONGEST)
        self.graphs = self.compile(optimizer, key, slots)
        self.parallel = [numel >= graph.PARALLEL_FROM for numel in self.numels]
        kept = [self.parts_of(m) for m in slots]
        self.views = [self._views(piece, kept[piece.slot]) for piece in self.pieces]
        if key.block_size:
            self._prepare_blocks()

    def _prepare_blocks(self) -> None:
        """What a step of what is quantized needs of the pieces."""
        coded, rows = sum(codec.block_size > 0 for codec in self.key.codecs), PIECE // self.key.block_size
        waiting = [
            [torch.empty(rows, self.key.block_size, device=self.key.device) for _ in range(coded)]
            for _ in range(graph.SLOTS)
        ]
        # Of each number of rows that a piece has, and each slot, what waits there.
        self.waiting = {
            n: [[t[:n] for t in slot] for slot in waiting]
            for n in {(piece.stop - piece.start) // self.key.block_size for piece in self.pieces}
        }
        self.lengths: list[list[int]] = [[] for _ in self.numels]
        self.whole = list(map(self._whole, self.pieces))
        self.coded = []
        for piece, (_, states) in zip(self.pieces, self.views, strict=True):
            self.lengths[piece.slot].append(piece.stop - piece.start)
            self.coded.append(
                [parts for codec, parts in zip(self.key.codecs[1:], states, strict=True) if codec.block_size]
            )

    def _views(self, piece: Piece, kept: list[list[Tensor]]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The piece of a parameter's parts: those of the parameter, and of each state."""
        views = []
        for codec, parts in zip(self.key.codecs, kept, strict=True):
            own, stop = [], piece.stop + -piece.stop % (codec.block_size or 1)
            for part, per_item in zip(parts, codec.elements_per_item, strict=True):
                view = flat(part)[piece.start // per_item : stop // per_item]
                own.append(view.view(-1, self.key.block_size // per_item) if self._whole(piece) else view)
            views.append(own)
        return views[0], views[1:]

    def _whole(self, piece: Piece) -> bool:
        """Whether a piece is of whole blocks."""
        return bool(self.key.block_size) and (piece.stop - piece.start) % self.key.block_size == 0

    @classmethod
    def compile(
        cls, optimizer: Update, key: Key, slots: list[ParamSlot], ahead: bool = False
    ) -> dict[bool, list[Graph]]:
        rows = first_scalars(optimizer, key)
        scaled = optimizer.scales_gradients or any(row.factor != 1 for row in rows)
        what: Any = (key.variant.rule, type(rows[0].h), key.codecs, key.gradient, key.compute, key.device, scaled)
        what += (key.variant.averaged,)
        graphs: dict[bool, list[Graph]] = {}
        for parallel in {local(m.p).numel() >= graph.PARALLEL_FROM for m in slots}:
            graphs[parallel] = [graph.graph_for(*what, parallel)]
            if key.block_size:
                graphs[parallel].append(graph.codes_graph_for(key.codecs, key.device, parallel))
        return graphs

    def measure(self) -> Tensor:
        return measure(self)

    def run(self, rows: list[StepScalars | None]) -> None:
        table = table_of(rows, self.key.compute, self.key.device, self.key.variant.averaged).unbind()
        keys: list[Tensor] | list[None] = [None] * len(self.pieces)
        if self.random:
            keys = list(self.random_keys().unbind())
        if self.key.block_size:
            self._run_blocks(rows, table, keys)
            self.mark_written()
            return
        calls: dict[tuple[int, bool], list[Tensor]] = {}
        for piece, (param, states), key in zip(self.pieces, self.views, keys, strict=True):
            g = self.gradients[piece.slot]
            if g is None:
                continue
            tensors = calls.setdefault((self.row_of[piece.slot], self.parallel[piece.slot]), [])
            tensors += param
            tensors.append(g if len(param[0]) == g.numel() else flat(g)[piece.start : piece.stop])
            for parts in states:
                tensors += parts
            if key is not None:
                tensors.append(key)
        for (row, parallel), tensors in calls.items():
            self.graphs[parallel][0](table[row], tensors)
        self.mark_written()

    def _run_blocks(
        self, rows: list[StepScalars | None], table: tuple[Tensor, ...], keys: list[Tensor] | list[None]
    ) -> None:
        """In turns of as many slots as a call has: first the rule, then the codes of what it returned."""
        turns: dict[tuple[int, bool], list[tuple[int, Tensor]]] = {}
        number = 0
        for slot, (g, lengths) in enumerate(zip(self.gradients, self.lengths, strict=True)):
            own = range(number, number + len(lengths))
            number += len(lengths)
            row = rows[self.row_of[slot]]
            if g is None or row is None or not lengths:
                continue
            turn = turns.setdefault((self.row_of[slot], self.parallel[slot]), [])
            for i, part in zip(own, torch.split(flat(g), lengths), strict=True):
                if self.whole[i]:
                    turn.append((i, part))
                else:
                    run_eagerly(self.key, self.views[i][0], part, self.views[i][1], row, keys[i])
        for (row_number, parallel), pieces in turns.items():
            for start in range(0, len(pieces), graph.SLOTS):
                self._run_turn(pieces[start : start + graph.SLOTS], self.graphs[parallel], table[row_number], keys)

    def _run_turn(
        self, pieces: list[tuple[int, Tensor]], graphs: list[Graph], row: Tensor, keys: list[Tensor] | list[None]
    ) -> None:
        tensors: list[Tensor] = []
        coded: list[Tensor] = []
        block_size = self.key.block_size
        for slot, (i, g) in enumerate(pieces):
            param, states = self.views[i]
            blocks = g.view(-1, block_size)
            waiting = self.waiting[len(blocks)][slot]
            tensors += param
            tensors.append(blocks)
            for parts in states:
                tensors += parts
            tensors += waiting
            for parts, value in zip(self.coded[i], waiting, strict=True):
                coded += parts
                coded.append(value)
            key = keys[i]
            if key is not None:
                tensors.append(key)
                coded.append(key)
        of_rule, of_codes = graphs
        of_rule(row, tensors)
        of_codes(row, coded)
