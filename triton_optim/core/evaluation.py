"""The averages of an optimizer in the place of the weights, where a model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..precision.kept import check_state
from ..spec import AVERAGE, COUNT, WEIGHTS, averages
from ..util.layout import local, with_local
from .saving import SavedOptimizer


class EvaluatedOptimizer(SavedOptimizer):
    """An optimizer whose parameters may be other than those that it trains, for a while."""

    @property
    def training(self) -> bool:
        """False after :meth:`eval`, until :meth:`train`."""
        return self.engine.swapped != "eval()"

    @torch.no_grad()
    def eval(self) -> None:
        """Make the parameters their averages (``ema_decay``) until :meth:`train`: what trainers call before they
        evaluate a model that is then saved, too. Without averages, again or within :meth:`averaged_parameters` it
        changes nothing.

        Each state keeps the parameter's weights meanwhile, as ``weights``. They are saved, loaded and copied with it,
        so that a checkpoint of model and optimizer goes on exactly from where training was.

        Raises:
            RuntimeError: an average is not of its parameter's shape. Nothing was changed.

        Example:
            >>> import torch, triton_optim
            >>> p = torch.nn.Parameter(torch.zeros(1))
            >>> optimizer = triton_optim.SGD([p], lr=1.0, ema_decay=0.5, backend="eager")
            >>> for _ in range(2):
            ...     p.grad = torch.ones(1)
            ...     optimizer.step()
            >>> optimizer.eval()
            >>> p.item()
            -1.5
            >>> optimizer.train()
            >>> p.item()
            -2.0
        """
        if self.engine.swapped is not None:
            return
        self.engine.forget_probe()
        for p, state in self._averaged():
            if WEIGHTS not in state:  # a parameter that is listed twice
                state[WEIGHTS] = with_local(p, local(p).detach().clone())
                local(p).copy_(local(state[AVERAGE]))
                self.engine.swapped = "eval()"

    @torch.no_grad()
    def train(self) -> None:
        """Make the parameters their weights again, bit for bit, after :meth:`eval`. Else it changes nothing.

        Raises:
            RuntimeError: weights are not of their parameter's shape. Nothing was changed.
        """
        if self.engine.swapped != "eval()":
            return
        own = [(p, state) for p, state in self.state.items() if WEIGHTS in state]
        numbers: dict[Any, Any] = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for p, state in own:
            check_state(self, numbers.get(p, "that is in no group"), p, WEIGHTS, state)
        for p, state in own:
            local(p).copy_(local(state.pop(WEIGHTS)))
        self.engine.swapped = None

    def _averaged(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters that have averages, with their states.

        Raises:
            RuntimeError: an average is not its parameter's.
        """
        found = []
        params = [(p, averages(group)) for group in self.param_groups for p in group["params"]]
        for i, (p, kept) in enumerate(params):
            state = self.state.get(p, {})
            # An average of no values is what the parameter was when the state was made.
            if kept and state.get(AVERAGE) is not None and float(state.get(COUNT, 0)):
                check_state(self, i, p, AVERAGE, state)
                found.append((p, state))
        return found

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within it, the parameters are their averages (``ema_decay``): for evaluation, or to save the model.

        Parameters that were not updated yet stay as they are. On leaving, the weights are back, bit for bit; they are
        kept meanwhile in as much memory as they take. After :meth:`eval` the parameters are their averages already, and
        stay so. The optimizer is saved, loaded and copied outside: training would go on from averages, with states that
        are not theirs.

        Raises:
            RuntimeError: nothing is averaged, it is entered already, or a step is made within it, or the optimizer
                saved, loaded or copied.

        Example:
            >>> import torch, triton_optim
            >>> p = torch.nn.Parameter(torch.zeros(1))
            >>> optimizer = triton_optim.SGD([p], lr=1.0, ema_decay=0.5, backend="eager")
            >>> for _ in range(2):
            ...     p.grad = torch.ones(1)
            ...     optimizer.step()
            >>> with optimizer.averaged_parameters():
            ...     print(p.item())
            -1.5
            >>> p.item()
            -2.0
        """
        engine = self.engine
        if engine.swapped == "averaged_parameters()":
            raise RuntimeError("averaged_parameters() is entered already: leave it first.")
        if not any(map(averages, self.param_groups)):
            raise RuntimeError(f"{engine.name} keeps no averages. Give it ema_decay, such as ema_decay=0.999.")
        if engine.swapped == "eval()":
            yield
            return
        own = self._averaged()
        kept = [local(p).detach().clone() for p, _ in own]
        engine.swapped = "averaged_parameters()"
        try:
            with torch.no_grad():
                for p, state in own:
                    local(p).copy_(local(state[AVERAGE]))
            yield
        finally:
            with torch.no_grad():
                for (p, _), before in zip(own, kept, strict=True):
                    local(p).copy_(before)
            engine.swapped = None
