"""What becomes of the update of any optimizer."""

from __future__ import annotations

from typing import Any

import torch

from ..core.checks import check_range
from ..kernels.rules import wrappers as rules
from ..spec import Measured
from .decay import check_weight_decay, kept
from .wrapper import Base, Wrapper

LEAST_SHARE = 1e-3  # of elements that agree


def cautious_scale(measured: Measured) -> dict[str, Any]:
    """1 over the share of the elements that move."""
    (count,) = measured.sums
    return {"scale": 1 / (count / measured.numel.clamp(min=1)).clamp(min=LEAST_SHARE)}


def clip_scale(measured: Measured) -> dict[str, Any]:
    """What brings a step's root mean square to at most lr * clip_threshold, as a replay of the step has it."""
    (squares,) = measured.sums
    longest = measured.h.clipped_longest
    length = (squares / measured.numel.clamp(min=1)).sqrt()
    return {"scale": torch.where(length > longest, longest / length, 1.0)}


def clip_scalars(group: dict[str, Any], step: Any) -> dict[str, Any]:
    """What is kept, and the longest step."""
    return kept(group) | {"scale": 1.0, "longest": group["lr"] * group["clip_threshold"]}


def check_threshold(group: dict[str, Any]) -> None:
    """Raise ValueError where it is not positive."""
    check_weight_decay(group)
    check_range("clip_threshold", group["clip_threshold"], 0.0)
    if group["clip_threshold"] == 0:
        raise ValueError("Invalid clip_threshold: 0.0. It must be positive: 1.0 is usual.")


_CAUTIOUS = Wrapper(
    "Cautious",
    rules.cautious,
    rules.agreements,
    scalars=lambda group, step: kept(group) | {"scale": 1.0},
    check=check_weight_decay,
    factors=cautious_scale,
    takes_decay=True,
    moves_only=True,
    reads_gradient=True,
    place=f"{__name__}:cautious",
)
_CLIP_UPDATE = Wrapper(
    "Clipped",
    rules.clipped,
    rules.squares,
    hyperparameters={"clip_threshold": 1.0},
    scalars=clip_scalars,
    check=check_threshold,
    factors=clip_scale,
    takes_decay=True,
    moves_only=True,
    place=f"{__name__}:clip_update",
)


def cautious(base: Base) -> Base:
    r"""An optimizer's class in which only those elements move whose step goes down the gradient.

    With :math:`u_t` what the base subtracts, without decay, and :math:`m_t` 1 where :math:`u_t g_t > 0` and else 0:

    .. math:: p_t = (1 - \gamma\lambda) p_{t-1} - \frac{u_t m_t}{\max(\operatorname{mean} m_t, 10^{-3})}

    The mean is over a parameter. Weight decay is decoupled, whatever the base's is.

    Args:
        base: the class of an optimizer, such as AdamW or Lion.

    Raises:
        TypeError: the base has a prologue, or measures, or its step depends on the parameter otherwise than by its
            decay.

    Example:
        >>> import torch, triton_optim
        >>> kind = triton_optim.cautious(triton_optim.SGD)
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = kind([p], lr=0.5, momentum=0.5, backend="eager")
        >>> for gradient in ([4.0, 4.0], [2.0, -1.0]):
        ...     p.grad = torch.tensor(gradient)
        ...     optimizer.step()
        ...     print(p.tolist())  # the second element's momentum goes up the gradient: the first goes twice as far
        [-2.0, -2.0]
        [-6.0, -2.0]

    For: AdamW, Lion and their like, as they are set already: it has nothing to tune.

    Source: Liang et al. 2024, Algorithm 2, https://arxiv.org/abs/2411.16085; the bound of the mean is of the authors'
    C-AdamW. The paper, and their C-Lion, add 1 to the number of elements that agree.
    """
    return _CAUTIOUS(base)


def clip_update(base: Base) -> Base:
    r"""An optimizer's class whose steps have at most ``clip_threshold`` times the learning rate as their root mean
    square.

    With :math:`u_t` what the base subtracts, without decay, and the root mean square over a parameter:

    .. math:: p_t = (1 - \gamma\lambda) p_{t-1} - \frac{u_t}{\max(1, \operatorname{RMS}(u_t) / (\gamma d))}

    Weight decay is decoupled, whatever the base's is.

    Args:
        base: the class of an optimizer with a learning rate. What it returns takes ``clip_threshold`` :math:`d > 0`,
            1.0 by default.

    Raises:
        TypeError: the base measures, or its step depends on the parameter otherwise than by its decay.

    Example:
        >>> import torch, triton_optim
        >>> kind = triton_optim.clip_update(triton_optim.SGD)
        >>> p = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = kind([p], lr=0.5, clip_threshold=2.0, backend="eager")
        >>> p.grad = torch.full((4,), 100.0)
        >>> optimizer.step()
        >>> p.tolist()
        [-1.0, -1.0, -1.0, -1.0]

    For: Loss spikes of an optimizer that does not clip its updates itself.

    Source: Shazeer & Stern 2018, section 6, https://arxiv.org/abs/1804.04235.
    """
    return _CLIP_UPDATE(base)
