"""What becomes of gradients before the rule of any optimizer."""

from __future__ import annotations

from torch import Tensor

from .wrapper import Base, Wrapper


def centered(g: Tensor) -> Tensor:
    """A gradient of two dimensions or more without the mean of each of its rows."""
    return g if g.dim() < 2 or not g.numel() else g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)


_CENTRALIZED = Wrapper("Centralized", prologue=centered, place=f"{__name__}:centralized")


def centralized(base: Base) -> Base:
    r"""An optimizer's class that takes of each gradient of two dimensions or more the mean of its rows away.

    A row is what makes one output: all that has one first index.

    .. math:: g_{ij} \leftarrow g_{ij} - \operatorname{mean}_k g_{ik}

    Args:
        base: the class of an optimizer, of real parameters.

    Example:
        >>> import torch, triton_optim
        >>> kind = triton_optim.centralized(triton_optim.SGD)
        >>> p = torch.nn.Parameter(torch.zeros(1, 3))
        >>> optimizer = kind([p], lr=1.0, backend="eager")
        >>> p.grad = torch.tensor([[1.0, 2.0, 6.0]])
        >>> optimizer.step()
        >>> p.tolist()
        [[2.0, 1.0, -3.0]]

    For: Convolutional and dense layers that overfit; it keeps nothing.

    Source: Yong et al. 2020, section 3, https://arxiv.org/abs/2004.01461. The authors' code also takes away the mean of
    a decay that is added to the gradient; as in the paper, only the loss's gradient is centered here.
    """
    return _CENTRALIZED(base)
