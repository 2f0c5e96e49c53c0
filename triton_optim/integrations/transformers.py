"""Hugging Face transformers' Trainer: averaged weights, gradient release, and Muon's groups."""

from __future__ import annotations

from typing import Any, Literal

import torch
from accelerate.state import GradientState
from transformers import TrainerCallback

from ..core.optimizer import RuleOptimizer
from ..core.unwrap import unwrap_optimizer
from ..optimizers.matrix.muon import Muon
from ..optimizers.matrix.param_groups import muon_param_groups
from ..training.gradient_release import GradientRelease, enable_gradient_release


class AveragedWeights(TrainerCallback):
    """Every checkpoint holds the averages (``ema_decay``; of Schedule-Free optimizers what they evaluate), and so does
    the model after training.

    The Trainer evaluates averages without it, and saves them where it has just evaluated; elsewhere it would save the
    weights. Training goes on from a checkpoint as from weights, bit for bit: these are in its optimizer's state.

    Args:
        save: ``"weights"`` has the checkpoints hold the weights instead, and evaluates the averages; for sharded
            parameters, of which no checkpoint can hold both.

    Give it last: it looks at what the callbacks before it asked for.
    """

    def __init__(self, save: Literal["averages", "weights"] = "averages") -> None:
        if save not in ("averages", "weights"):
            raise ValueError(f'Invalid save: {save!r}. Use "averages" or "weights".')
        self._averages = save == "averages"

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Before the Trainer evaluates and saves."""
        if control.should_save:
            self._move(optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Before the Trainer evaluates and saves."""
        if control.should_save:
            self._move(optimizer)

    def on_evaluate(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Between an evaluation and what is saved after it."""
        if optimizer is not None:  # there is none where a Trainer only evaluates
            self._move(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """After the best model was loaded, which stays."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._move(optimizer)

    def _move(self, optimizer: Any) -> None:
        ours: Any = unwrap_optimizer(optimizer)
        if hasattr(ours, "eval"):
            ours.eval() if self._averages else ours.train()


class ReleaseGradients(TrainerCallback):
    """Gradient release (:func:`triton_optim.enable_gradient_release`), with gradient accumulation."""

    def __init__(self) -> None:
        self._handle: GradientRelease | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Begin to release.

        Raises:
            ValueError: the Trainer would clip gradients that are gone.
        """
        if args.max_grad_norm > 0:
            raise ValueError(
                f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips the norm of all gradients, which "
                "gradient release never has at once. Set max_grad_norm=0, or leave ReleaseGradients out."
            )
        self._handle = enable_gradient_release(optimizer, accumulating=is_accumulating)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the optimizer step as ever."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def is_accumulating() -> bool:
    """Whether accelerate accumulates the gradients of the backward that runs now."""
    return not GradientState().sync_gradients


class MuonFactory:
    """For ``Trainer(optimizer_cls_and_kwargs=(MuonFactory, options))``: Muon of the groups of
    :func:`triton_optim.muon_param_groups`.

    The Trainer calls it with the model and `options`: those of :class:`triton_optim.Muon`, and ``heads``, ``adamw``,
    ``convolutions``, ``experts`` and ``splits`` of ``muon_param_groups``. An ``optimizer`` among them takes Muon's
    place, such as :class:`triton_optim.NorMuon`.
    """

    def __call__(
        self,
        model: torch.nn.Module,
        *,
        optimizer: type[RuleOptimizer] = Muon,
        heads: Any = ("lm_head", "head", "classifier", "score"),
        adamw: dict[str, Any] | None = None,
        convolutions: bool = False,
        experts: Any = (),
        splits: Any = None,
        **options: Any,
    ) -> RuleOptimizer:
        """The optimizer of a model."""
        groups = muon_param_groups(model, heads, adamw, convolutions=convolutions, experts=experts, splits=splits)
        made: Any = optimizer
        return made(groups, **options)  # type: ignore[no-any-return]
