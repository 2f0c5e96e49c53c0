"""Sparse gradients: the elements that one holds are gathered with their states, updated by the rule, and scattered."""

from __future__ import annotations

from torch import Tensor

from ...buckets.bucket import Bucket
from ...buckets.key import Key
from ...buckets.slots import ParamSlot
from ...buckets.step_scalars import StepScalars
from ...precision.averaging import average_of
from ...spec import Update
from ...util.hyperparameters import exact_number
from ..update import update
from .bucket import traffic


class SparseBucket(Bucket):
    keeps_layout = False
    takes_memory = False

    def _examine(self, values: list[Tensor], own: list[Tensor | None]) -> bool:
        # A group's hyperparameters decide whether single rows will do.
        if any(
            self.optimizer.sparse_gradients(self.optimizer.param_groups[c.group]) != "rows" for c in self.step_groups
        ):
            return False
        for value, kind, g in zip(values, self._kinds, own, strict=True):
            if (value.shape, value.stride(), value.dtype) != kind:
                return False
            if g is None:
                continue
            if not g.is_sparse or (g.shape, g.dtype, g.device) != (value.shape, self.key.dtypes[1], self.key.device):
                return False
        # An element that is held twice is meant to be added up first.
        return self._take([g if g is None else g.coalesce() for g in own])

    def run(self, rows: list[StepScalars | None]) -> None:
        key = rule = self.key
        if key.variant.averaged:
            rule = key._replace(variant=key.variant._replace(averaged=False), codecs=key.codecs[:-1])
        for i, (m, g) in enumerate(zip(self.slots, self.gradients, strict=True)):
            row = rows[self.row_of[i]]
            if g is None or row is None:
                continue
            written, where = [own for (own,) in self.parts_of(m)], tuple(g.indices())
            average = written.pop() if key.variant.averaged else None
            if key.differentiable:
                written[0] = m.p
            views = written
            if not where:  # without sparse dimensions, as of a scalar, the tensor is its own only row
                views, where = [t.unsqueeze(0) for t in written], (g.indices().new_zeros(g._nnz()),)
            p, *states = ([t[where]] for t in views)
            update(rule, p, g.values().reshape(p[0].shape), states, row)
            for t, (new,) in zip(views, (p, *states), strict=True):
                t[where] = new
            if average is not None:  # of all elements: those that stay are averaged as they are
                share = exact_number(row.weight)
                average.copy_(average_of(average.to(key.compute), written[0].to(key.compute), share))

    @classmethod
    def launches(cls, optimizer: Update, key: Key, slots: list[ParamSlot]) -> int:
        gathers = 2 * (len(key.dtypes) - 1)
        return (traffic(optimizer, key)[0] + gathers) * len(slots)

    @classmethod
    def bytes_per_parameter(cls, optimizer: Update, key: Key) -> float:
        """Of the elements that a gradient holds; the others are not touched."""
        sizes = [dtype.itemsize for dtype in key.dtypes]
        return traffic(optimizer, key)[1] + 4 * (sum(sizes) - sizes[1])
