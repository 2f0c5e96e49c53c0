"""Functions on optimizers: what they return is one rule again, and one kernel."""

from .decay import cautious_decay, decoupled_decay
from .gradient import centralized
from .momentum import lookahead, nesterov
from .update import cautious, clip_update
from .wrapper import Wrapper

__all__ = [
    "Wrapper",
    "cautious",
    "cautious_decay",
    "centralized",
    "clip_update",
    "decoupled_decay",
    "lookahead",
    "nesterov",
]
