"""Parameters as batches of matrices that are updated in bases of their own: what SOAP and those like it share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.factored import wide_zeros
from ...spec import State, Update
from ...util.in_place import write_each
from ...util.layout import gathered, is_sharded, placed_as, placements_of
from ...util.on_device import capturing
from .blocks import blocks_of
from .newton_schulz import LARGEST_BATCH, LARGEST_ON_CPU, product
from .owners import each_once

SIDES = ("L", "R")  # of a matrix: what multiplies it from the left is of its rows


def preconditioned(p: Tensor, group: dict[str, Any]) -> dict[str, int]:
    """The sides of a parameter, or of its blocks, that have a preconditioner, and how long they are. One of 1 needs
    none.
    """
    if p.numel() == 0 or p.dim() < (1 if group["precondition_1d"] else 2):
        return {}
    lengths = zip(SIDES, blocks_of(p, group.get("block_size")).shape, strict=True)
    return {side: n for side, n in lengths if 1 < n <= group["max_precond_dim"]}


class BasisScalars(NamedTuple):
    """What Muon's rule takes, and the prologue."""

    lr: float
    keep: float
    step: float  # for the prologue


def host_step(optimizer: Update, h: BasisScalars, params: list[Tensor]) -> int:
    """The number of a step, which decides what is done in it. Where the device counts, the host waits for it.

    Raises:
        RuntimeError: the step is captured.
    """
    if capturing(params[0].device):
        raise RuntimeError(
            f"{type(optimizer).__name__}: a step can't be captured into a CUDA graph, as the host chooses the steps in "
            "which preconditioners are decomposed. Capture forward and backward, and step outside of the graph."
        )
    return int(h.step)


def square_states(name: str, unit: bool = False) -> tuple[State, ...]:
    """A square matrix of each side, in float32 or wider; of a parameter in blocks, one a block.

    Args:
        name: with ``{}`` where the side goes.
        unit: whether it starts as the identity, not as zeros.
    """

    def of(side: str) -> State:
        return State(name.format(side), lambda p, group: square(p, group, side, unit))

    return tuple(map(of, SIDES))


def vector_states(name: str, start: str) -> tuple[State, ...]:
    """A vector of each side, filled with a number of the group, in float32 or wider."""

    def of(side: str) -> State:
        return State(name.format(side), lambda p, group: filled(p, preconditioned(p, group).get(side), group[start]))

    return tuple(map(of, SIDES))


def filled(p: Tensor, n: int | None, value: float) -> Tensor | None:
    """A vector beside the parameter."""
    return None if n is None else wide_zeros(p, (n,)).fill_(value)


def square(p: Tensor, group: dict[str, Any], side: str, unit: bool) -> Tensor | None:
    """Zeros beside the parameter, ``(n, n)``, or the identity; of several blocks, ``(blocks, n, n)``."""
    n, count = preconditioned(p, group).get(side), blocks_of(p, group.get("block_size")).number
    if n is None:
        return None
    zeros = wide_zeros(p, (n, n) if count == 1 else (count, n, n))
    return zeros.copy_(torch.eye(n, dtype=zeros.dtype, device=zeros.device)) if unit else zeros


def wide_dtype(p: Tensor) -> torch.dtype:
    """In which a parameter's update is computed."""
    return torch.promote_types(p.dtype, torch.float32)


def wide_zeros_like(p: Tensor) -> Tensor:
    """A state like the parameter, 0, in float32 or wider; of a sharded one sharded."""
    return torch.zeros_like(p, dtype=wide_dtype(p))


def moment(name: str, nonnegative: bool = False) -> State:
    """Such a state of every parameter."""
    return State(name, lambda p, _: wide_zeros_like(p), nonnegative)


class Batch:
    """Parameters of one shape, as a batch of matrices; and what is kept of them.

    Args:
        params: these; sharded ones are DTensors.
        gradients: theirs.
        states: theirs by name.
        longest: rows and columns that a block may have; None for whole matrices.

    Attributes:
        gradients: ``(B, rows, columns)``, in float32 or wider; B blocks, where matrices are cut.
        sides: those that have a preconditioner.
        bases: of these, orthogonal matrices by side, ``(B, n, n)``.
        rotated: the gradients in the bases, once they were brought there.
    """

    def __init__(
        self, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]], longest: int | None = None
    ) -> None:
        self._first, self._states, self._dtype = params[0], states, wide_dtype(params[0])
        self._blocks = blocks_of(params[0], longest)
        self.gradients = self._as_matrices(gradients)
        self.sides = sides_of(states[0])
        self.bases = {side: self.kept(f"Q_{side}") for side in self.sides if f"Q_{side}" in states[0]}
        self.rotated = self.gradients

    def _as_matrices(self, tensors: list[Tensor]) -> Tensor:
        whole = self._blocks.whole
        return self._blocks.cut(stacked([gathered(t).to(self._dtype).reshape(whole) for t in tensors]))

    def moments(self, name: str) -> Tensor:
        """A state of each that is like the parameter, ``(B, rows, columns)``."""
        return self._as_matrices([state[name] for state in self._states])

    def kept(self, name: str) -> Tensor:
        """A state of each that is of another shape, as a batch."""
        batch = stacked([state[name].to(self._dtype) for state in self._states])
        return batch if self._blocks.number == 1 else batch.flatten(0, 1)

    def whole(self, x: Tensor) -> Tensor:
        """What is like the gradients as matrices of the parameters."""
        return self._blocks.joined(x)

    def keep_moments(self, name: str, values: Tensor) -> None:
        """Write a state of each that is like the parameter."""
        self._write(name, self.whole(values))

    def keep(self, name: str, values: Tensor) -> None:
        """Write a state of each that is of another shape."""
        count = self._blocks.number
        self._write(name, values if count == 1 else values.view(-1, count, *values.shape[1:]))

    def _write(self, name: str, values: Tensor) -> None:
        held = [state[name] for state in self._states]
        own = [value.reshape(h.shape) for h, value in zip(held, values.unbind(), strict=True)]
        if any(map(is_sharded, held)):
            for h, value in zip(held, own, strict=True):
                h.copy_(placed_as(h, value))
        else:
            write_each(held, own)

    def into_bases(self, x: Tensor) -> Tensor:
        r""":math:`Q_L^\top x Q_R`; where there is no basis it is the identity."""
        x = self.bases["L"].mT @ x if "L" in self.bases else x
        return x @ self.bases["R"] if "R" in self.bases else x

    def out_of_bases(self, x: Tensor) -> Tensor:
        r""":math:`Q_L x Q_R^\top`."""
        x = self.bases["L"] @ x if "L" in self.bases else x
        return x @ self.bases["R"].mT if "R" in self.bases else x

    def begin(self) -> None:
        """Take the eigenvectors of the preconditioners for bases."""
        self.turn(self.decomposed({side: self.kept(side) for side in self.sides}, eigenvectors))

    def decomposed(self, matrices: dict[str, Tensor], decompose: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What comes of matrices by side. Ranks that have shards of the parameters share the work."""
        found = each_once(self._first, list(matrices.values()), decompose)
        return dict(zip(matrices, found, strict=True))

    def turn(self, bases: dict[str, Tensor]) -> None:
        """Take other bases."""
        for side, basis in bases.items():
            self.keep(f"Q_{side}", basis)
        self.bases = bases


def stacked(tensors: list[Tensor]) -> Tensor:
    """A batch of them. Autograd, which may keep it, is given a copy: what is in it will be written."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 and not torch.is_grad_enabled() else torch.stack(tensors)


def sides_of(state: dict[str, Any]) -> tuple[str, ...]:
    """The sides of which a parameter keeps a preconditioner."""
    return tuple(side for side in SIDES if state.get(side) is not None)


def batches(
    params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]], longest: int | None = None
) -> Iterator[tuple[list[int], Batch]]:
    """The parameters in batches, each with their indices: of one shape, and no larger than the memory of few.

    Args:
        longest: rows and columns that a block may have; None for whole matrices.
    """
    alike: dict[Any, list[int]] = {}
    for i, (p, state) in enumerate(zip(params, states, strict=True)):
        alike.setdefault((p.device, p.dtype, p.shape, sides_of(state), placements_of(p)), []).append(i)
    for (device, _, _, sides, placements), indices in alike.items():
        blocks = blocks_of(params[indices[0]], longest)
        rows, columns = blocks.shape
        largest = LARGEST_ON_CPU if device.type == "cpu" and placements is None else LARGEST_BATCH
        size = max(rows * columns, rows**2 * ("L" in sides), columns**2 * ("R" in sides), 1)
        at_once = max(1, largest // (blocks.number * size))
        for start in range(0, len(indices), at_once):
            own = indices[start : start + at_once]
            yield own, Batch([params[i] for i in own], [gradients[i] for i in own], [states[i] for i in own], longest)


def averaged_squares(held: Tensor, x: Tensor, share: float, weight: float) -> Tensor:
    r""":math:`s\, A + w\, x x^\top` of a batch; of columns pass the transpose.

    Args:
        held: A, symmetric.
        x: ``(B, n, m)``.
        share: s.
        weight: w.
    """
    if torch.is_grad_enabled():  # autograd records torch's products
        return torch.baddbmm(held, x, x.mT, beta=share, alpha=weight)
    return product(x, x, weight, share, held)


def rows_of(x: Tensor, side: str) -> Tensor:
    """The matrices whose rows are what a side preconditions."""
    return x if side == "L" else x.mT


def eigenvectors(a: Tensor) -> Tensor:
    """The eigenvectors of symmetric matrices, those of the largest eigenvalues first, as columns whose sum is not
    negative. On CUDA the host waits for them. Of a matrix that is not finite they are unit vectors.
    """
    values, vectors = decomposed(torch.where(finite(a), a, 0.0))
    vectors = in_order(vectors, torch.argsort(values, descending=True, stable=True))
    return vectors * signs(vectors.sum(-2, keepdim=True))


def iterated(a: Tensor, basis: Tensor, ordered: bool) -> tuple[Tensor, Tensor | None]:
    """A step towards the eigenvectors of symmetric matrices that have changed, from those of before: a power iteration.
    :func:`orthogonal` makes them of it.

    Args:
        a: the matrices.
        basis: their eigenvectors so far. They stay where a matrix is not finite.
        ordered: whether the columns are sorted anew first, by estimates of the eigenvalues, the largest first.

    Returns:
        The columns that are to be made orthogonal, and the numbers that they had before they were sorted.
    """
    longer = a @ basis
    longer = torch.where(finite(longer), longer, basis)
    order = None
    if ordered:
        order = torch.argsort((basis * longer).sum(-2), descending=True, stable=True)
        longer = in_order(longer, order)
    return longer, order


def orthogonal(x: Tensor) -> Tensor:
    """Q of the QR decomposition of matrices, whose R has no diagonal elements below 0."""
    q, r = torch.linalg.qr(x)
    turned: Tensor = q * signs(r.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)
    return turned


def inverse_roots_of(a: Tensor, root: int, eps: float) -> Tensor:
    r""":math:`(A + \epsilon I)^{-1/r}` of symmetric matrices without eigenvalues below 0 but by rounding. On CUDA the
    host waits for it. Of a matrix that is not finite it is that of zeros.

    Args:
        a: A.
        root: r.
        eps: :math:`\epsilon`.
    """
    values, vectors = decomposed(torch.where(finite(a), a, 0.0))
    values = values - values[..., :1].clamp(max=0.0) + eps
    return vectors * values.pow(-1 / root).unsqueeze(-2) @ vectors.mT


def decomposed(a: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of symmetric matrices, rising, and eigenvectors; in float64 where it fails in float32."""
    try:
        values, vectors = torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # which it does not list
        values, vectors = (x.to(a.dtype) for x in torch.linalg.eigh(a.double()))
    return values, vectors


def in_order(x: Tensor, order: Tensor, dim: int = -1) -> Tensor:
    """The columns of matrices, with another `dim` the rows, in this order, ``(B, n)``."""
    return x.gather(dim, order.unsqueeze(-3 - dim).expand_as(x))


def finite(x: Tensor) -> Tensor:
    """Whether all elements of a matrix are, ``(B, 1, 1)``."""
    return x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def signs(x: Tensor) -> Tensor:
    """-1 where a number is negative, else 1."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
