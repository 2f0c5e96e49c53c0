"""Momenta of matrices, orthogonalized: here, or, if they are sharded, each on one of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.factored import averaged
from ...dispatch import GPUS
from ...util.layout import local, with_local
from .newton_schulz import iterated_in, newton_schulz
from .owners import shared_out
from .pieces import Pieces, cut_between_matrices


def averaged_gradients(
    states: list[dict[str, Any]], gradients: list[Tensor], weight: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Move the states ``momentum_buffer`` towards the gradients by a weight.

    Returns:
        The new averages, and the gradients in their dtypes.
    """
    buffers = [state["momentum_buffer"] for state in states]
    gradients = [g.to(b.dtype) for g, b in zip(gradients, buffers, strict=True)]
    if torch.is_grad_enabled():  # the graph of a step must not see what the next one writes
        return list(averaged(buffers, gradients, weight)), gradients
    torch._foreach_lerp_(buffers, gradients, weight)
    return buffers, gradients


class Momenta:
    """The momenta of parameters in a step of Muon. Each is computed when it is its turn to be orthogonalized.

    Args:
        group: the parameter group.
        buffers: the averages of the gradients.
        gradients: the gradients, in the dtypes of the averages.
        signed: whether the signs of the momenta are orthogonalized.
        scales: a function of the group and the pieces; gives the factor of each piece's update. None for 1.
    """

    def __init__(
        self,
        group: dict[str, Any],
        buffers: list[Tensor],
        gradients: list[Tensor],
        signed: bool,
        scales: Callable[[dict[str, Any], Pieces], list[float]] | None,
    ) -> None:
        self._group, self._buffers, self._gradients = group, buffers, gradients
        self._signed, self._scales = signed, scales

    def of(self, indices: list[int]) -> list[Tensor]:
        """The momenta of the parameters with these indices: new tensors, sharded as the parameters are."""
        own = [self._buffers[i] for i in indices]
        nesterov = self._group["nesterov"]
        if nesterov:
            own = list(torch._foreach_lerp([self._gradients[i] for i in indices], own, self._group["momentum"]))
        if self._signed:
            return list(torch._foreach_sign(own))
        return own if nesterov else list(map(torch.clone, own))

    def orthogonalized(
        self, like: list[Tensor] | None = None, fetch: Callable[[list[int]], list[Tensor]] | None = None
    ) -> tuple[Pieces, list[Tensor]]:
        """Orthogonalize tensors piece by piece.

        Args:
            like: tensors of their shapes, dtypes and devices; None for the momenta of all parameters.
            fetch: computes the tensors with the given indices.

        Returns:
            The pieces, and the update of each.
        """
        group, like = self._group, self._buffers if like is None else like
        pieces = Pieces(group, like)
        found = newton_schulz(
            pieces.like(like),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
            [1.0] * len(pieces.shapes) if self._scales is None else self._scales(group, pieces),
            pieces.fetching(fetch or self.of),
        )
        return pieces, found

    def of_shards(self, params: list[Tensor], everywhere: bool) -> list[Tensor]:
        """The orthogonalized momentum of each sharded parameter: a DTensor, or with `everywhere` the whole tensor."""

        def joined(like: list[Tensor], fetch: Callable[[list[int]], list[Tensor]]) -> list[Tensor]:
            pieces, found = self.orthogonalized(like, fetch)
            return pieces.join(found)

        results: dict[int, Tensor] = {}
        if here := [i for i, p in enumerate(params) if not everywhere and cut_between_matrices(p, self._group)]:
            parts = joined(
                [local(self._buffers[i]) for i in here], lambda own: list(map(local, self.of([here[i] for i in own])))
            )
            results.update((i, with_local(params[i], part)) for i, part in zip(here, parts, strict=True))
        if others := [i for i in range(len(params)) if i not in results]:
            costs = Pieces(self._group, params).costs()
            found = shared_out(
                [params[i] for i in others],
                [costs[i] for i in others],
                lambda own: self.of([others[i] for i in own]),
                lambda whole: joined(whole, lambda own: [whole[i] for i in own]),
                sent_as,
                everywhere,
            )
            results.update(zip(others, found, strict=True))
        return [results[i] for i in range(len(params))]


def sent_as(momentum: Tensor) -> torch.dtype:
    """The dtype in which ranks send orthogonalized momenta: that of the iteration where all ranks have the same."""
    return iterated_in(momentum) if momentum.device.type in GPUS else momentum.dtype
