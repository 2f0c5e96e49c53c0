"""Optimizers that train elsewhere than they evaluate: `train()` and `eval()` move the parameters between the two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..options import Options
from ..precision.codecs import Codec, part_names, read, write
from ..precision.kept import check_residuals, check_state, current_codec, current_parameter_codec
from ..util.hyperparameters import plain_group
from ..util.layout import local
from .optimizer import RuleOptimizer


class TwoPlaces(RuleOptimizer):
    r"""An optimizer whose gradients are taken at :math:`y = \beta x + (1 - \beta) z`, a mean of :math:`x`, where models
    are evaluated, and a state :math:`z`.

    The parameter is :math:`y`, and :math:`x` after :meth:`eval`. It is made in training mode; ``train_mode`` of a group
    says where its parameters are, and is saved with it.

    Class attributes:
        z: the name of the state.
    """

    z: ClassVar[str] = "z"

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        super().__init__(params, {**defaults, "train_mode": True}, **options)

    def share(self, group: dict[str, Any]) -> Any:
        r""":math:`\beta` of a group, in (0, 1); its hyperparameters as :meth:`scalars` gets them."""
        raise NotImplementedError(f"{type(self).__name__} needs a method share(group)")

    @property
    def training(self) -> bool:
        return all(group["train_mode"] for group in self.param_groups)

    def eval(self) -> None:
        """Move the parameters to where models are evaluated, and saved to be used. Again, it changes nothing.

        A parameter without states stays. Parameters are rounded as their dtype has it; ``param_precision`` keeps of
        them what it keeps in a step.

        Raises:
            RuntimeError: it is called within ``averaged_parameters()``, or a state is not its parameter's. Nothing was
                changed.
        """
        self._move(train_mode=False)

    def train(self) -> None:
        """Move the parameters back to where gradients are taken. Again, or at first, it changes nothing.

        Raises:
            RuntimeError: it is called within ``averaged_parameters()``, or a state is not its parameter's. Nothing was
                changed.
        """
        self._move(train_mode=True)

    @torch.no_grad()
    def _move(self, train_mode: bool) -> None:
        self.engine.check_not_swapped("train()" if train_mode else "eval()")
        self.engine.forget_probe()
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            state = self.state.get(p, {})
            if state.get(self.z) is not None:
                check_state(self, i, p, self.z, state)
                check_residuals(i, p, state)
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                share = float(self.share(plain_group(group)))
                self._move_to_z(group["params"], 1 - share if train_mode else 1 - 1 / share)
                group["train_mode"] = train_mode

    def _move_to_z(self, params: list[Tensor], weight: float) -> None:
        """Move parameters by `weight` times what their states are ahead of them."""
        together: tuple[list[Tensor], list[Tensor]] = ([], [])
        elsewhere: list[tuple[Tensor, Tensor]] = []  # parameters, and copies of them where their states are
        for p in dict.fromkeys(params):  # one that is listed twice moves once
            state = self.state.get(p, {})
            held = current_codec(self, state, self.z)
            if held is None:
                continue
            own = current_parameter_codec(state, p)
            value = local(p).detach()
            here = value.to(state[self.z].device)
            if here is not value:
                elsewhere.append((value, here))
            parts = [here, *(local(state[name]) for name in part_names(own, None))]
            ahead = [local(state[name]) for name in (self.z, *part_names(held, self.z))]
            if own == held:
                together[0].append(parts[0])
                together[1].append(ahead[0])
            else:
                move(own, parts, read(held, ahead, parts[0]), weight)
        if together[0]:
            torch._foreach_lerp_(*together, weight)
        for value, here in elsewhere:
            value.copy_(here)

    def _check_edited(self, group: dict[str, Any], numbers: dict[str, Any] | None) -> None:
        if not group["train_mode"]:
            raise RuntimeError(
                f"{type(self).__name__}: a step in evaluation mode; the parameters are not where gradients are taken. "
                "Call optimizer.train() before the forward pass."
            )
        super()._check_edited(group, numbers)


def move(codec: Codec, parts: list[Tensor], to: Tensor, weight: float) -> None:
    """Move what a codec keeps by `weight` times what `to` is ahead of it."""
    value = read(codec, parts, parts[0])
    wide = torch.promote_types(value.dtype, to.dtype)
    write(codec, parts, torch.lerp(value.to(wide), to.to(wide), weight))
