"""The history of L-BFGS as one matrix, and the products it takes to apply it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class History:
    """The last pairs of step s and change of gradient y as one matrix, and their products on the host.

    One slot more than `size` takes the pair that is not accepted yet. Slots are reused in turn; `order` lists the
    accepted ones, oldest first.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.size = size
        self.pairs = like.new_empty(min(size + 1, 8), 2, like.numel())
        self.order: list[int] = []
        self.spare = 0
        self.sy = torch.zeros(size + 1, size + 1, dtype=torch.float64, device="cpu")
        self.yy = torch.zeros_like(self.sy)
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []

    def holds(self, steps: Any, changes: Any, size: int) -> bool:
        """Say whether a state's lists are those last handed out."""
        return steps is self.steps and changes is self.changes and len(steps) == len(self.order) and size == self.size

    def lists(self) -> tuple[list[Tensor], list[Tensor]]:
        """Hand out the pairs as views, oldest first, s and y."""
        self.steps = [self.pairs[slot, 0] for slot in self.order]
        self.changes = [self.pairs[slot, 1] for slot in self.order]
        return self.steps, self.changes

    def refill(self, steps: list[Tensor], changes: list[Tensor]) -> None:
        """Take the pairs of a loaded state."""
        for s, y in zip(steps[-self.size :], changes[-self.size :], strict=True):
            self._grow()
            self.pairs[self.spare, 0].copy_(s)
            self.pairs[self.spare, 1].copy_(y)
            self._accept(self._products(y))

    def update(self, s: Tensor, y: Tensor, g: Tensor) -> tuple[float, Tensor]:
        """Take a pair if its curvature is positive.

        Returns:
            The scale s'y / y'y of the initial inverse Hessian, or 0 for a pair not taken; and the products of all
            pairs in `order` with g, of shape (2, pairs).
        """
        self._grow()
        slot = self.spare
        self.pairs[slot, 0], self.pairs[slot, 1] = s, y
        # Both in one transfer, the only one of the direction.
        with_y, with_g = self._products(y, g)
        ys, yy = with_y[slot].tolist()
        if ys > 1e-10:
            self._accept(with_y)
            scale = ys / yy
        else:
            self.pairs[slot].zero_()  # 0 times an overflow would be NaN
            scale = 0.0
        return scale, with_g[self.order].T

    def direction(self, g: Tensor, with_g: Tensor, scale: float) -> Tensor:
        """Compute -Hg by equation 7.24 of Nocedal & Wright: small systems on the host, one product on the device."""
        if not self.order:
            return g.mul(-scale)
        index = torch.tensor(self.order, device="cpu")
        upper = self.sy[index[:, None], index].triu()
        sg, yg = with_g[0, :, None], with_g[1, :, None]
        u = torch.linalg.solve_triangular(upper, sg, upper=True)
        inner = upper.diagonal()[:, None] * u + scale * (self.yy[index[:, None], index] @ u - yg)
        v = torch.linalg.solve_triangular(upper.T, inner, upper=False)
        # Without the spare slot where it is the last: it may never have been written.
        used = max(self.order) + 1
        coefficients = torch.zeros(used, 2, dtype=torch.float64, device="cpu")
        coefficients[index] = torch.cat((-v, scale * u), dim=1)
        return torch.addmv(g, self.pairs[:used].flatten(0, 1).T, coefficients.view(-1).to(g), beta=-scale)

    def _products(self, *vectors: Tensor) -> Tensor:
        """Multiply all pairs, the spare one too, by each vector; not by a matrix of them, which TF32 may round."""
        matrix = self.pairs[: max([self.spare, *self.order]) + 1].flatten(0, 1)
        products = torch.stack([matrix.mv(v) for v in vectors]).to("cpu", torch.float64)
        return products.view(len(vectors), -1, 2).squeeze(0)

    def _grow(self) -> None:
        used = len(self.pairs)
        if self.spare == used:
            grown = self.pairs.new_empty(min(2 * used, self.size + 1), *self.pairs.shape[1:])
            grown[:used] = self.pairs
            self.pairs = grown

    def _accept(self, with_y: Tensor) -> None:
        slot, used = self.spare, len(with_y)
        self.sy[:used, slot] = with_y[:, 0]
        self.yy[:used, slot] = self.yy[slot, :used] = with_y[:, 1]
        self.order.append(slot)
        self.spare = self.order.pop(0) if len(self.order) > self.size else len(self.order)
