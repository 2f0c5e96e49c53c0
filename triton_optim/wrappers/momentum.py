"""Weights that follow, or go ahead of, those of any optimizer."""

from __future__ import annotations

from typing import Any

from ..core.checks import check_range
from ..kernels.rules import wrappers as rules
from ..spec import State
from .decay import check_weight_decay, kept
from .wrapper import Base, Wrapper


def lookahead_scalars(group: dict[str, Any], step: Any) -> dict[str, Any]:
    """Whether the slow weights follow in this update."""
    follows = (step % group["lookahead_steps"] == 0) * 1.0
    return {"follows": follows, "alpha": group["lookahead_alpha"]}


def check_lookahead(group: dict[str, Any]) -> None:
    """Raise ValueError where one is out of range."""
    if not (isinstance(group["lookahead_steps"], int) and group["lookahead_steps"] >= 1):
        raise ValueError(f"Invalid lookahead_steps: {group['lookahead_steps']!r}. Use a whole number from 1 on, as 5.")
    check_range("lookahead_alpha", group["lookahead_alpha"], 0.0, 1.0)


def nesterov_scalars(group: dict[str, Any], step: Any) -> dict[str, Any]:
    """What is kept, and the momentum."""
    return kept(group) | {"momentum": group["nesterov_momentum"]}


def check_nesterov(group: dict[str, Any]) -> None:
    """Raise ValueError where the momentum is out of range."""
    check_weight_decay(group)
    check_range("nesterov_momentum", group["nesterov_momentum"], 0.0, 1.0)


_LOOKAHEAD = Wrapper(
    "Lookahead",
    rules.lookahead,
    hyperparameters={"lookahead_steps": 5, "lookahead_alpha": 0.5},
    scalars=lookahead_scalars,
    check=check_lookahead,
    states=(State("slow", "parameter", quantized=False),),
    counts_steps=True,
    place=f"{__name__}:lookahead",
)
_NESTEROV = Wrapper(
    "Nesterov",
    rules.nesterov,
    hyperparameters={"nesterov_momentum": 0.9},
    scalars=nesterov_scalars,
    check=check_nesterov,
    states=(State("velocity", quantized=False),),
    takes_decay=True,
    moves_only=True,
    place=f"{__name__}:nesterov",
)


def lookahead(base: Base) -> Base:
    r"""An optimizer's class with slow weights, which every few steps follow a part of the way and are gone back to.

    After :math:`k` steps of the base from :math:`s`, to :math:`f`: :math:`s \leftarrow s + \alpha (f - s)`, and the
    parameter goes on from there.

    Args:
        base: the class of an optimizer. What it returns takes ``lookahead_steps`` :math:`k \ge 1`, 5 by default, and
            ``lookahead_alpha`` :math:`\alpha` in [0, 1], 0.5 by default.

    Example:
        >>> import torch, triton_optim
        >>> kind = triton_optim.lookahead(triton_optim.SGD)
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = kind([p], lr=1.0, lookahead_steps=2, backend="eager")
        >>> for _ in range(4):
        ...     p.grad = torch.ones(1)
        ...     optimizer.step()
        ...     print(p.item())
        -1.0
        -1.0
        -2.0
        -2.0

    For: Noisy training whose weights swing, for one copy of the weights.

    Source: Zhang et al. 2019, Algorithm 1, https://arxiv.org/abs/1907.08610; the authors' code has 0.8 for
    :math:`\alpha` unless told.
    """
    return _LOOKAHEAD(base)


def nesterov(base: Base) -> Base:
    r"""An optimizer's class with Nesterov's momentum of its steps.

    With :math:`u_t` what the base subtracts, without decay, at the point ahead, which the parameter is:

    .. math:: v_t = \mu v_{t-1} - u_t, \qquad p_t = (1 - \gamma\lambda) p_{t-1} + \mu v_t - u_t

    Weight decay is decoupled, whatever the base's is.

    Args:
        base: the class of an optimizer. What it returns takes ``nesterov_momentum`` :math:`\mu` in [0, 1), 0.9 by
            default.

    Raises:
        TypeError: the base's step depends on the parameter otherwise than by its decay.

    Example:
        >>> import torch, triton_optim
        >>> kind = triton_optim.nesterov(triton_optim.SGD)
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = kind([p], lr=1.0, nesterov_momentum=0.5, backend="eager")
        >>> p.grad = torch.ones(1)
        >>> optimizer.step()
        >>> p.item()
        -1.5

    For: Optimizers without momentum, or that are to look ahead along the one they have.

    Source: Sutskever et al. 2013, section 2, https://proceedings.mlr.press/v28/sutskever13.html.
    """
    return _NESTEROV(base)
