"""Steps that are captured into a graph: whether one may be, and whether its replays would still be right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Update, offloads
from .plan import Plan


def check_capture(
    optimizer: Update, params: list[Tensor], gradients: list[Tensor | None], devices: list[torch.device]
) -> None:
    """Raise RuntimeError where a step that is captured on these devices would not be right when it is replayed."""
    name = type(optimizer).__name__
    if any(map(offloads, optimizer.param_groups)):
        raise RuntimeError(
            f'{name}: a captured step cannot run on the host. Leave offload="cpu" out, or step outside the graph.'
        )
    if not all(group.get("capturable") for group in optimizer.param_groups):
        raise RuntimeError(
            f"{name}: a captured step reads its numbers on the device. Make the optimizer with capturable=True."
        )
    for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
        if p.requires_grad and g is None:
            raise RuntimeError(
                f"{name}: parameter {i} requires a gradient and has none while a graph is captured; replays would "
                "never update it. Capture backward with the step, or give it a gradient before."
            )
        if g is not None and p.device not in devices:
            raise RuntimeError(
                f"{name}: parameter {i} is on {p.device}, of which the graph that is captured records nothing; replays "
                "would never update it. Give it to an optimizer of its own, and step that outside the graph."
            )


def check_captured(optimizer: Update, plan: Plan) -> None:
    """Raise RuntimeError where replays of a captured step would not write the parameters and states that there are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not plan.same_params(params):
        raise RuntimeError(
            f"the optimizer has {len(params)} parameters and had {len(plan.params)}, or others, when its step was "
            "captured: replays would update the old ones. Capture it again."
        )
    for bucket in plan.buckets:
        if moved := bucket.moved():
            raise RuntimeError(
                f"parameter {moved[0]} or one of its states lies elsewhere than when the step was captured: replays "
                "would write where it was. Capture it again."
            )
