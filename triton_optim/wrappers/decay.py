"""Weight decay around any optimizer."""

from __future__ import annotations

from typing import Any

from ..core.checks import check_ranges
from ..kernels.rules import wrappers as rules
from .wrapper import Base, Wrapper

BY = ("lr", "independent", "corrected")


def kept(group: dict[str, Any]) -> dict[str, Any]:
    """What weights are multiplied by: 1 - lr * weight_decay."""
    return {"keep": 1 - group["lr"] * group["weight_decay"]}


def check_weight_decay(group: dict[str, Any]) -> None:
    """Raise ValueError where it is negative."""
    check_ranges(group, "weight_decay")


def kept_by(group: dict[str, Any], step: Any) -> dict[str, Any]:
    """The same, as ``decay_by`` says."""
    lr, by = group["lr"], group["decay_by"]
    rate = lr if by == "lr" else 1.0 if by == "independent" else lr * (lr / group["max_lr"])
    return {"keep": 1 - rate * group["weight_decay"]}


def check_decay_by(group: dict[str, Any]) -> None:
    """Raise ValueError where it is none of its values, or lacks ``max_lr``."""
    check_weight_decay(group)
    if group["decay_by"] not in BY:
        raise ValueError(f"Invalid decay_by: {group['decay_by']!r}. Use one of {', '.join(BY)}.")
    if group["decay_by"] == "corrected" and not (group["max_lr"] is not None and group["max_lr"] > 0):
        raise ValueError(
            f"Invalid max_lr: {group['max_lr']}, with decay_by='corrected'. Give the largest learning rate of the "
            "schedule."
        )


_CAUTIOUS_DECAY = Wrapper(
    "CautiousDecay",
    rules.cautious_decay,
    scalars=lambda group, step: kept(group),
    check=check_weight_decay,
    takes_decay=True,
    moves_only=True,
    place=f"{__name__}:cautious_decay",
)
_DECOUPLED_DECAY = Wrapper(
    "Decoupled",
    rules.decoupled_decay,
    hyperparameters={"decay_by": "lr", "max_lr": None},
    scalars=kept_by,
    check=check_decay_by,
    takes_decay=True,
    moves_only=True,
    place=f"{__name__}:decoupled_decay",
)


def cautious_decay(base: Base) -> Base:
    r"""An optimizer's class with weight decay for those elements alone that its step does not take farther from 0.

    With :math:`u_t` what the base subtracts, without decay:

    .. math:: p_t = p_{t-1} - u_t - \gamma \lambda p_{t-1} [u_t p_{t-1} \ge 0]

    Args:
        base: the class of an optimizer. One that has no ``weight_decay`` takes one, 0 by default.

    Raises:
        TypeError: the base's step depends on the parameter otherwise than by its decay.

    Example:
        >>> import torch, triton_optim
        >>> kind = triton_optim.cautious_decay(triton_optim.SGD)
        >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = kind([p], lr=0.5, weight_decay=0.5, backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()  # down by 0.5; the first goes towards 0 and decays by a quarter
        >>> p.tolist()
        [0.25, -1.5]

    For: Long runs whose decay is tuned; records of modded-nanogpt are set with it.

    Source: Chen et al. 2025, Algorithm 1, https://arxiv.org/abs/2510.12402; where the step is 0, too, the weight
    decays.
    """
    return _CAUTIOUS_DECAY(base)


def decoupled_decay(base: Base) -> Base:
    r"""An optimizer's class with weight decay beside the step, not in the gradient.

    With :math:`u_t` what the base subtracts, without decay, and :math:`\eta_t` by ``decay_by``: :math:`\gamma_t` for
    "lr", as AdamW; 1 for "independent" of it; :math:`\gamma_t^2 / \gamma_{max}` for "corrected", as AdamC:

    .. math:: p_t = (1 - \eta_t \lambda) p_{t-1} - u_t

    Args:
        base: the class of an optimizer. What it returns takes ``decay_by``, and ``max_lr`` :math:`\gamma_{max}`, which
            "corrected" needs.

    Raises:
        TypeError: the base's step depends on the parameter otherwise than by its decay.

    Example:
        >>> import torch, triton_optim
        >>> kind = triton_optim.decoupled_decay(triton_optim.SGD)
        >>> p = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = kind([p], lr=0.5, weight_decay=0.25, decay_by="independent", backend="eager")
        >>> p.sum().backward()
        >>> optimizer.step()
        >>> p.tolist()
        [0.25]

    For: Optimizers that add their decay to the gradient, or decay that is not to follow the learning rate.

    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, whose decay is independent of the learning rate;
    Defazio 2025, https://arxiv.org/abs/2506.02285.
    """
    return _DECOUPLED_DECAY(base)
