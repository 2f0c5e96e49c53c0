"""Saving, loading, copying and pickling of an optimizer, as torch.optim.Optimizer does them; moving its states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import chain, count
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..buckets.state import WatchedState, watch
from ..engine.engine import Engine
from ..spec import WEIGHTS, Update, states_device
from ..util.layout import is_sharded, local, with_local
from ..util.link import host_memory, pins
from .checkpoint import fill_in, loaded_groups, loaded_states, packed, without_left
from .loadable import check_groups, check_keys
from .saved_form import loaded_state, saved_states


def reduced_for_processes(optimizer: SavedOptimizer) -> tuple[Any, ...]:
    """As it is pickled for a process that this one starts: its states stay where they are, in memory that both see."""
    reduced: Any = optimizer.__reduce_ex__(2)
    state = reduced[2]
    held = {p: dict(own) for p, own in optimizer.state.items() if p in state["state"]}
    return (*reduced[:2], {**state, "state": defaultdict(dict, held)})


def check_loadable(optimizer: SavedOptimizer) -> None:
    """Raise RuntimeError where a state dict in evaluation mode could not be loaded again: distributed checkpoints load
    no state that a new optimizer has not.
    """
    engine = optimizer.engine
    if engine.swapped == "eval()" and any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            f"{engine.name}: state_dict() in evaluation mode, with sharded parameters. Call optimizer.train() first, "
            "and save the weights; under transformers' Trainer "
            'triton_optim.integrations.transformers.AveragedWeights(save="weights") does.'
        )


class SavedOptimizer(Optimizer, Update):
    """An optimizer that saves its states in another form than it keeps them in."""

    engine: Engine

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ForkingPickler.register(cls, reduced_for_processes)

    def _check_edited(self, group: dict[str, Any], numbers: dict[str, Any] | None) -> None:
        """Raise where a group has come to hold what the constructor refuses; see GroupValues.read."""

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as in torch.optim. Steps that share memory are handed out as tensors of their own.

        A quantized state is a dict of its codes, their scales and how they are read. torch.optim cannot take it for a
        tensor: its step raises. It can have :func:`to_torch_state_dict`. Where a torch.distributed process group is
        initialized it is its values in float32, placed as the parameter, and the codes made of them again are the same:
        torch.distributed.checkpoint then saves and loads on any number of ranks, into any ``state_dtype``.
        """
        self.engine.check_not_inside("state_dict()")
        check_loadable(self)
        self.engine.probe_again()
        # As torch's own, in one pass: another one over its result would take as long again.
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = packed(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ours or of torch.optim's.

        Unlike torch's, it keeps the dtype in which each state was saved: torch casts all but ``step`` to the
        parameter's, and float32 moments of bfloat16 parameters would be lost.

        Raises:
            TypeError: it is no dict.
            ValueError: it is that of another library (:func:`convert_state_dict` takes some), or its
                groups, or the names of its states, are not those of this optimizer, or a state lacks some.
            KeyError: it lacks its groups or states, or a group a hyperparameter.
            RuntimeError: a state is not of its parameter's shape or kind, or quantized in a way that can't be read. In
                all cases nothing was changed.
        """
        self.engine.check_not_inside("load_state_dict()")
        if not isinstance(state_dict, Mapping):  # a hook may bring what its keys lack
            check_keys(state_dict)

        def ready(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            check_groups(self, state_dict)
            state_dict = without_left(self, self.engine.probe, state_dict)
            groups = loaded_groups(self, state_dict)
            # What is by parameter torch leaves as it is: else it would look for each value's parameter in all groups.
            states = loaded_states(self, state_dict, groups)
            for group in groups:  # of which torch asks only how many there are
                group["params"] = range(len(group["params"]))
            return {**state_dict, "param_groups": groups, "state": states}

        handle = self.register_load_state_dict_pre_hook(ready)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if self.engine.release is not None:
            self.engine.release.restart()

    @torch.no_grad()
    def offload_states(self) -> None:
        """Move all states to host memory, page-locked where copies are faster for it, until they are needed again.

        For phases that need the device's memory for something else, such as generation between updates. What is on
        the host already stays; numbers such as ``step`` stay where they are. State dicts saved meanwhile are the same,
        with tensors on the CPU. The next step, or :meth:`load_states`, brings the states back; a state dict that is
        loaded is beside the parameters. The freed memory is torch's to use again; ``torch.cuda.empty_cache()`` gives it
        to other programs.

        Raises:
            RuntimeError: a step was captured into a graph, whose replays write where the states were.

        Example:
            >>> import torch, triton_optim
            >>> p = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = triton_optim.AdamW([p], backend="eager")
            >>> p.grad = torch.ones(2)
            >>> optimizer.step()
            >>> optimizer.offload_states()  # generate, evaluate
            >>> optimizer.load_states()
            >>> optimizer.state[p]["exp_avg"].device == p.device
            True
        """
        self.engine.drop_plans("offload_states()")
        moved: dict[int, Tensor] = {}  # what parameters share is moved once
        devices = set()
        for state in self.state.values():
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

    @torch.no_grad()
    def load_states(self) -> None:
        """Bring the states back to where steps need them: beside the parameters, or in host memory where ``offload``
        keeps them there. Again, or where they were never moved, it changes nothing.

        Raises:
            RuntimeError: a step was captured into a graph.
        """
        self.engine.drop_plans("load_states()")
        moved: dict[int, Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                device, state = states_device(group, p), self.state.get(p, {})
                for name, value in list(state.items()):
                    if isinstance(value, Tensor) and value.dim() and value.device != device:
                        if id(value) not in moved:
                            moved[id(value)] = value.to(device, non_blocking=pins(device))
                        state[name] = moved[id(value)]

    def __getstate__(self) -> dict[str, Any]:
        self.engine.check_not_inside("a copy")
        probed = set(map(id, self.engine.probe.params(self)))
        own = {p: state for p, state in self.state.items() if id(p) not in probed}
        states = dict(zip(own, saved_states(self, own), strict=True))
        kept = ("defaults", "param_groups", "backend", "amp", "max_grad_norm")
        return {name: getattr(self, name) for name in kept} | {"state": defaultdict(dict, states)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = dict(state["state"])
        # Else they are as they are held: load_state_dict made them.
        if set(map(type, states.values())) != {WatchedState}:
            numbers: dict[Tensor, Any] = dict.fromkeys(
                (p for p in states if isinstance(p, Tensor)), "that is in no group"
            )
            numbers |= zip(chain.from_iterable(g["params"] for g in state["param_groups"]), count())
            states |= {p: loaded_state(self, i, p, states[p]) for p, i in numbers.items() if p in states}
        limit = {name: state[name] for name in ("max_grad_norm",) if name in state}
        own = {name: value for name, value in state.items() if name not in limit}
        super().__setstate__(own | {"state": defaultdict(dict, states)})
        watch(self)
        # A copy has none of these; who loads a state dict keeps them.
        for name, value in {"backend": "auto", "amp": None}.items():
            self.__dict__.setdefault(name, value)
        if "engine" in self.__dict__:
            self.engine.reset()
        else:
            self.engine = Engine(self, self._check_edited)
        self.engine.max_grad_norm = limit.get("max_grad_norm", self.engine.max_grad_norm)
        self.engine.swapped = "eval()" if any(WEIGHTS in state for state in self.state.values()) else None
        fill_in(self)
