"""Lightning: averaged weights and gradient release as callbacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from ..core.unwrap import unwrap_optimizer
from ..training.gradient_release import GradientRelease, enable_gradient_release


class AveragedWeights(Callback):
    """Validation, checkpoints and the model after training have the averages (``ema_decay``; of Schedule-Free
    optimizers what they evaluate); training batches have the weights.

    Training goes on from a checkpoint as from weights, bit for bit: these are in the optimizer's state. A
    ``ModelCheckpoint(save_weights_only=True)`` that saves between two batches, ``every_n_train_steps``, is not told to
    callbacks: it holds the weights. Optimizers that keep no averages are left alone.
    """

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the forward pass."""
        train(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Before validation; until the next batch they stay, and ModelCheckpoint saves them."""
        evaluate(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Before ModelCheckpoint saves, which Lightning calls last."""
        evaluate(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """After the last batch."""
        evaluate(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Where it is saved between two batches."""
        if all(optimizer.training for optimizer in averaging(trainer)):
            evaluate(trainer)
            weights = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = {n: v.clone() if isinstance(v, Tensor) else v for n, v in weights.items()}
            checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]
            train(trainer)


class ReleaseGradients(Callback):
    """Gradient release (:func:`triton_optim.enable_gradient_release`), with ``accumulate_grad_batches``."""

    def __init__(self) -> None:
        self._handles: list[GradientRelease] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to release.

        Raises:
            ValueError: the Trainer would clip or scale gradients that are gone.
        """
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) clips gradients, which gradient release never "
                "has at once. Leave one of them out."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                'Trainer(precision="16-mixed") scales gradients, which gradient release has no step to unscale in. Use '
                '"bf16-mixed", which needs no scaler, or leave ReleaseGradients out.'
            )
        accumulating = trainer.fit_loop._should_accumulate
        self._handles = [enable_gradient_release(optimizer, accumulating) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the optimizers step as ever."""
        while self._handles:
            self._handles.pop().remove()


def averaging(trainer: Any) -> list[Any]:
    """The optimizers of a Trainer that may train elsewhere than they evaluate."""
    return [unwrap_optimizer(optimizer) for optimizer in trainer.optimizers]


def evaluate(trainer: Any) -> None:
    """Put what is evaluated in the place of the weights."""
    for optimizer in averaging(trainer):
        optimizer.eval()


def train(trainer: Any) -> None:
    """Put the weights back."""
    for optimizer in averaging(trainer):
        optimizer.train()
