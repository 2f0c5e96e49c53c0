"""The last resort: the rule as torch operations, a parameter at a time. It runs anything."""

from __future__ import annotations

from torch import Tensor

from ...buckets.bucket import Bucket
from ...buckets.step_scalars import StepScalars
from ..update import measure, update


class EagerBucket(Bucket):
    takes_memory = False

    def run(self, rows: list[StepScalars | None]) -> None:
        keys = self.random_keys() if self.random else None
        for i, (m, g) in enumerate(zip(self.slots, self.gradients, strict=True)):
            row = rows[self.row_of[i]]
            if g is None or row is None:
                continue
            # Under autograd the parameter itself is written, so that the graph goes through it.
            param, *states = self.parts_of(m)
            if self.key.differentiable:
                param[0] = m.p
            update(self.key, param, g, states, row, None if keys is None else keys[i])

    def measure(self) -> Tensor:
        return measure(self)
