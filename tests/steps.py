"""The steps that tests of launches and of graphs take: every optimizer, and AdamW with every option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from table import CASES
from torch.nn import Parameter

import triton_optim
from triton_optim import RuleOptimizer

SHAPES = ((160, 160), (64, 64), (7,))  # for loops on all threads, for codes, and for neither
BF16, F32 = torch.bfloat16, torch.float32
PRECISIONS = ("storage", "stochastic", "kahan", "split24", "split32", "master")
WHOLE = {"max_grad_norm": 1.0, "ema_decay": 0.9}


class Step(NamedTuple):
    """A step of an optimizer.

    Attributes:
        cls: its class.
        dtype: of the parameters.
        options: of the optimizer.
        misaligned: whether no parameter and no gradient lies at a multiple of 16 bytes.
        looked: whether a gradient scaler has looked for infinities.
    """

    cls: type[RuleOptimizer]
    dtype: torch.dtype
    options: dict[str, Any]
    misaligned: bool = False
    looked: bool = True

    def optimizer(self, backend: str, device: torch.device, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Any:
        """An optimizer of parameters without gradients, and with a gradient scale if it takes one."""
        shapes = tuple(s for s in shapes if not issubclass(self.cls, triton_optim.Muon) or len(s) == 2)
        params = [Parameter(self.tensor(shape, device)) for shape in shapes]
        optimizer = self.cls(params, **self.options, backend=backend)
        if "amp" in self.options:
            optimizer.grad_scale = torch.ones(1, device=device)
            optimizer.found_inf = torch.zeros(1, device=device) if self.looked else None
        return optimizer

    def tensor(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Normally distributed."""
        value = torch.randn(shape).to(device, self.dtype)
        if not self.misaligned:
            return value
        moved = torch.empty(value.numel() + 1, device=device, dtype=self.dtype)[1:].view(shape)
        return moved.copy_(value)

    def give_gradients(self, optimizer: RuleOptimizer) -> None:
        """A new gradient for each parameter."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = self.tensor(p.shape, p.device)


def every_step() -> dict[str, Step]:
    """Every optimizer that has a rule, and AdamW in every dtype, precision and option."""
    adamw = triton_optim.AdamW
    steps = {
        f"{case.name}, {name}": Step(case.ours, F32, options)
        for case in CASES
        if not case.sparse
        for name, options in case.variants.items()
    }
    for state in (None, F32, BF16, "int8", "int4"):
        for precision in PRECISIONS:
            options = {"param_precision": precision, "state_dtype": state}
            steps[f"AdamW, bfloat16 {precision}, states {state}"] = Step(adamw, BF16, options)
    for dtype in (torch.float64, torch.float16):
        steps[f"AdamW, {dtype}"] = Step(adamw, dtype, {})
    for dtype in (torch.float64, F32, BF16, torch.float16):
        steps[f"AdamW, clipped, {dtype}, misaligned"] = Step(adamw, dtype, {"max_grad_norm": 1.0}, misaligned=True)
    steps["AdamW, float32, states int8"] = Step(adamw, F32, {"state_dtype": "int8"})
    steps["AdamW, clipped and averaged"] = Step(adamw, F32, WHOLE)
    steps["AdamW, clipped and averaged, bfloat16 int8"] = Step(adamw, BF16, WHOLE | {"state_dtype": "int8"})
    steps["AdamW, amsgrad, averaged in bfloat16"] = Step(
        adamw, F32, {"amsgrad": True, "ema_decay": 0.9, "ema_dtype": BF16}
    )
    steps["AdamW, amp"] = Step(adamw, F32, {"amp": "fused"})
    steps["AdamW, amp, clipped and averaged"] = Step(adamw, F32, WHOLE | {"amp": "fused"})
    steps["AdamW, amp, looking for infinities"] = Step(adamw, F32, {"amp": "fused"}, looked=False)
    steps["AdamW, capturable"] = Step(adamw, F32, {"capturable": True})
    steps["AdamW, capturable, clipped and averaged, bfloat16 stochastic"] = Step(
        adamw, BF16, WHOLE | {"capturable": True, "param_precision": "stochastic"}
    )
    steps["NAdam, capturable"] = Step(triton_optim.NAdam, F32, {"capturable": True})
    steps["Muon, clipped and averaged"] = Step(triton_optim.Muon, F32, WHOLE)
    return steps


def two_steps(backend: str, step: Step, device: torch.device) -> Iterator[Any]:
    """Two steps, between which everything that a schedule may change does; gives what to do between them."""
    optimizer = step.optimizer(backend, device)
    for factor in (1.0, 0.5):
        step.give_gradients(optimizer)
        for group in optimizer.param_groups:
            group |= {} if group["lr"] is None else {"lr": group["lr"] * factor}
        optimizer.step()
        yield optimizer
