"""The optimizer, and the model, inside what trainers wrap them in."""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from ..engine.engine import Engine
from .optimizer import RuleOptimizer

# Where wrappers keep what they wrap: accelerate's, Lightning's and DeepSpeed's; ZeroRedundancyOptimizer.
INSIDE = ("optimizer", "optim")
# Modules that are another module and add nothing to it, by the names of their classes, as some are of packages that may
# not be installed. The names of parameters that users know are those of the inner module.
MODEL_INSIDE = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "_FabricModule": "module",
    "OptimizedModule": "_orig_mod",
}


def unwrap_optimizer(optimizer: Any) -> RuleOptimizer:
    """The optimizer of this package inside what accelerate, Lightning, DeepSpeed or ZeRO made of it.

    Args:
        optimizer: it, or what has it as its ``optimizer`` or ``optim``; these may have wrappers inside, too.

    Raises:
        TypeError: there is none inside.

    Example:
        >>> import torch, triton_optim
        >>> from triton_optim.integrations import unwrap_optimizer
        >>> class Wrapped:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> ours = triton_optim.AdamW([torch.zeros(2)])
        >>> unwrap_optimizer(Wrapped(ours)) is ours
        True
    """
    found, path = optimizer, [optimizer]
    # Lightning's wrappers are of the classes that they wrap, and pass on what they have not: an engine is had by one.
    while not isinstance(getattr(found, "__dict__", {}).get("engine"), Engine):
        inner = (getattr(found, name, None) for name in INSIDE)
        found = next((each for each in inner if each is not None and all(each is not seen for seen in path)), None)
        if found is None:
            names = " > ".join(f"{type(each).__module__}.{type(each).__qualname__}" for each in path)
            raise TypeError(
                f"this needs an optimizer of triton_optim, or what has one as its {' or '.join(INSIDE)}; it got "
                f"{names}. "
                "Make it with triton_optim's class of that name, or give the one that is inside."
            )
        path.append(found)
    ours: RuleOptimizer = found
    return ours


def unwrap_model(model: Module) -> Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel``, Fabric's wrapper and ``torch.compile``'s."""
    while (inside := MODEL_INSIDE.get(type(model).__name__)) is not None:
        model = getattr(model, inside)
    return model
