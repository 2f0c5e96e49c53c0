"""The averages of an optimizer in the place of the weights, where a model is evaluated."""

from __future__ import annotations

from contextlib import AbstractContextManager

from .averages import averaged_parameters, swap_back, swap_in
from .saving import SavedOptimizer


class EvaluatedOptimizer(SavedOptimizer):
    """An optimizer whose parameters may be other than those that it trains, for a while."""

    @property
    def training(self) -> bool:
        """False after :meth:`eval`, until :meth:`train`."""
        return self.engine.swapped != "eval()"

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
        swap_in(self, self.engine)

    def train(self) -> None:
        """Make the parameters their weights again, bit for bit, after :meth:`eval`. Else it changes nothing.

        Raises:
            RuntimeError: weights are not of their parameter's shape. Nothing was changed.
        """
        swap_back(self, self.engine)

    def averaged_parameters(self) -> AbstractContextManager[None]:
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
        return averaged_parameters(self, self.engine)
