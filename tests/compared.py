"""What tests compare of trainings."""

import copy
from typing import Any

import torch
from torch import Tensor


def values(model: torch.nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]


def bits(opt: Any) -> Any:
    """Parameters, states and averages of an optimizer; a copy."""
    params = [p.detach() for group in opt.param_groups for p in group["params"]]
    return copy.deepcopy((params, opt.state_dict()["state"]))


def assert_same_bits(one: Any, other: Any) -> None:
    """Tensors, or what holds some, that are equal to the last bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)
