"""Moves an optimizer's states to host memory, and back beside the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..spec import Update, states_device
from ..util.layout import local, with_local
from ..util.link import host_memory, pins


def states_to_host(optimizer: Update, engine: Engine) -> None:
    """See :meth:`RuleOptimizer.offload_states`."""
    engine.drop_plans("offload_states()")
    moved: dict[int, Tensor] = {}  # what parameters share is moved once
    devices = set()
    for state in optimizer.state.values():
        for name, value in list(state.items()):
            if not isinstance(value, Tensor) or not value.dim() or value.device.type == "cpu":
                continue
            devices.add(value.device)
            if id(value) not in moved:
                own = local(value).detach()
                host = host_memory(own)
                host.copy_(own, non_blocking=True)
                moved[id(value)] = with_local(value.detach(), host)
            state[name] = moved[id(value)]
    for device in filter(pins, devices):
        torch.get_device_module(device).current_stream(device).synchronize()


def states_to_device(optimizer: Update, engine: Engine) -> None:
    """See :meth:`RuleOptimizer.load_states`."""
    engine.drop_plans("load_states()")
    moved: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            device, state = states_device(group, p), optimizer.state.get(p, {})
            for name, value in list(state.items()):
                if isinstance(value, Tensor) and value.dim() and value.device != device:
                    if id(value) not in moved:
                        moved[id(value)] = value.to(device, non_blocking=pins(device))
                    state[name] = moved[id(value)]
