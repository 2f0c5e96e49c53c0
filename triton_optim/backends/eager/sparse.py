"""Sparse gradients: the elements that one holds are gathered with their states, updated by the rule, and scattered."""

from __future__ import annotations

from ...buckets.bucket import Bucket
from ...buckets.step_scalars import StepScalars
from ...precision.averaging import average_of
from ...util.hyperparameters import exact_number
from ..update import update


class SparseBucket(Bucket):
    takes_memory = False

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
