"""A user's own model, named as ``module:name``."""

from __future__ import annotations

from torch import nn

from ..util.named import load
from .models import Shapes


def own_shapes(name: str) -> Shapes:
    """The shapes of the parameters of the `torch.nn.Module` that ``module:name`` returns; tied ones count once.

    Raises:
        ValueError: it is not there, or returns no module with parameters that are trained.
    """
    model = load("--model", name)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} returned {type(model).__name__}. Return a torch.nn.Module.")
    shapes: Shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    if not shapes:
        raise ValueError(f"--model {name} returned a module with no parameter to train. Return one that has some.")
    return shapes
