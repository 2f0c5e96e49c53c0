"""What optimizers make of norms over a parameter."""

from torch import Tensor, where


def trust_ratio(long: Tensor, short: Tensor) -> Tensor:
    """How many times as long the one is as the other; 1 where one of them is 0."""
    return where((long > 0) & (short > 0), long / short, 1.0)
