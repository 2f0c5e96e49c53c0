"""A user's script, which type checkers are to accept: `.ci/package.sh` has mypy and pyright look at it, and runs it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

import triton_optim as optim
from triton_optim.kernels.language import jit, sign


class Scalars(NamedTuple):
    """What the rule below takes."""

    lr: float


@jit
def sign_descent(p: Any, g: Any, h: Any) -> Any:
    """A step of one length, against the gradient."""
    return (p - h.lr * sign(g),)


class SignDescent(optim.RuleOptimizer):
    """An optimizer of the user's own."""

    rule = sign_descent

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, **options: Unpack[optim.Options]) -> None:
        super().__init__(params, {"lr": lr}, **options)

    def scalars(self, group: dict[str, float], step: float) -> Scalars:
        return Scalars(group["lr"])


def main() -> None:
    """Train with some of what there is."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 128)
    optimizers: list[torch.optim.Optimizer] = [
        optim.AdamW(model.parameters(), lr=1e-3, state_dtype="int8", max_grad_norm=1.0, ema_decay=0.9),
        optim.cautious(optim.Lion)(model.parameters(), lr=1e-4),
        optim.Muon(optim.muon_param_groups(model), lr=1e-3),
        SignDescent(model.parameters(), lr=1e-4, backend="eager"),
    ]
    for optimizer in optimizers:
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(4, 128)).square().mean()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    adamw = optimizers[0]
    assert isinstance(adamw, optim.AdamW)
    with adamw.averaged_parameters():
        report: optim.MemoryReport = optim.memory_report(adamw)
    print(report, optim.explain(adamw), sep="\n")
    saved = optim.to_torch_state_dict(adamw)
    torch.optim.AdamW(model.parameters()).load_state_dict(saved)


if __name__ == "__main__":
    main()
