"""Clipping of gradients by their norm or by value, with torch's signatures and one reading pass."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..backends.norms import over_shards, partial_norms
from ..buckets.gradient_norm import Norm, clip_coefficient, norm_from, on_one_device
from ..dispatch import Backend
from ..util.layout import has_memory, is_sharded, local_gradient, ordinary
from .gradient_release import check_not_released


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale the gradients so that the norm of all together is at most `max_norm`: ``torch.nn.utils.clip_grad_norm_``.

    .. math::
        g \leftarrow g \min\left(1, \frac{\text{max\_norm}}{\lVert g \rVert_p + 10^{-6}}\right), \qquad
        \lVert g \rVert_p = \Big(\sum |g_i|^p\Big)^{1/p}

    All tensors are read in one pass, and added up in an order that depends on nothing but their sizes: runs of some
    thousand elements in float32, their sums in float64. The norm has the same bits on every run. An optimizer's
    ``max_grad_norm`` saves the pass that writes.

    Args:
        parameters: whose gradients are clipped; those without are left out. Sharded ones (DTensor) count as wholes.
        max_norm: the largest norm allowed.
        norm_type: p: positive, or ``"inf"`` for the largest magnitude. Others are torch's, its dtype too.
        error_if_nonfinite: raise where the norm is NaN or infinite. Else it is what the gradients are scaled by.
        foreach: False adds up tensor by tensor.

    Returns:
        The norm, a 0-dim tensor on the first gradient's device: float32, of float64 gradients float64.

    Raises:
        RuntimeError: the norm is not finite and `error_if_nonfinite`; or the gradients are released in backward.

    Example:
        >>> import torch, triton_optim
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> triton_optim.clip_grad_norm_([p], max_norm=1.0)
        tensor(5.)
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    params = listed(parameters)
    params = [p for p in params if p.grad is not None]
    if not params:
        return torch.tensor(0.0)
    gradients = own_gradients(params)
    power = float(norm_type)
    if power > 0:
        norm = Norm(power)
        backend: Backend | None = "eager" if foreach is False else None
        if any(map(is_sharded, params)):
            found = over_shards(params, gradients, norm)
        else:
            found = partial_norms(gradients, norm, backend)
        total = norm_from(on_one_device(found, gradients[0].device), norm)
        wide = any(g.dtype in (torch.float64, torch.complex128) for g in gradients)
        total = total.to(torch.float64 if wide else torch.float32)
    else:
        total = torch.nn.utils.get_total_norm(gradients, power, foreach=foreach)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"The total norm of order {power} for gradients from `parameters` is non-finite: {total.item()}. Find the "
            "loss that made it so, or set `error_if_nonfinite=False` to scale by it."
        )
    coefficient = clip_coefficient(total, float(max_norm))
    if coefficient.device.type == "cpu" and has_memory(coefficient) and coefficient == 1:
        return total
    # Together with others, a wrapper subclass would have them multiplied once for each tensor that it holds.
    for device, own in by_device([g for g in gradients if has_memory(g)]).items():
        torch._foreach_mul_(own, ordinary(coefficient).to(device))
    for device, own in by_device([g for g in gradients if not has_memory(g)]).items():
        torch._foreach_mul_(own, coefficient.to(device))
    return total


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    r"""Limit each element of the gradients to :math:`[-\text{clip\_value}, \text{clip\_value}]`, in place:
    ``torch.nn.utils.clip_grad_value_``. NaN stays.

    Args:
        parameters: whose gradients are clipped.
        clip_value: the largest magnitude allowed.
        foreach: False goes tensor by tensor.

    Raises:
        RuntimeError: the gradients are released in backward.
    """
    gradients = own_gradients([p for p in listed(parameters) if p.grad is not None])
    limit = float(clip_value)
    for device, own in by_device(gradients).items():
        if foreach is False or device.type == "cpu":  # where one pass a tensor is less than two for all
            for g in own:
                g.clamp_(-limit, limit)
        else:
            torch._foreach_clamp_min_(own, -limit)
            torch._foreach_clamp_max_(own, limit)


def listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list; an empty generator is warned of, as in torch."""
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if isinstance(parameters, types.GeneratorType) and not params:
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4)
    check_not_released(params)
    return params


def own_gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients as they are on this process, sparse ones as the values that they hold; to be written in place."""
    found = []
    for p in params:
        assert p.grad is not None
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # what is held twice is clipped as one
            found.append(p.grad._values())
        else:
            if is_sharded(p) and p.grad.placements != p.placements:  # type: ignore[attr-defined]
                p.grad = p.grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
            found.append(local_gradient(p, p.grad))
    return found


def by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    """The tensors of each device, those of one dtype together."""
    found: dict[torch.device, list[Tensor]] = {}
    for t in sorted(tensors, key=lambda t: str(t.dtype)):
        found.setdefault(t.device, []).append(t)
    return found
