"""Steps that the machine executes, and what they must come to: tests and tests/ptx_matrix.py take them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from ptx_machine.executor import Executor
from side_by_side import nearest_roots
from torch import Tensor
from torch.nn import Parameter

from triton_optim.backends.triton import stub_driver
from triton_optim.kernels import multi_tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# How parameters and states are kept: each codec once, and what people combine.
KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp64": (F64, {}),
    "fp16": (F16, {}),
    "bf16, states fp32": (BF16, {"state_dtype": F32}),
    "fp32, states bf16": (F32, {"state_dtype": BF16}),
    "bf16 stochastic": (BF16, {"param_precision": "stochastic", "state_dtype": BF16}),
    "fp16 stochastic": (F16, {"param_precision": "stochastic"}),
    "fp32, states int8": (F32, {"state_dtype": "int8"}),
    "fp64, states int8": (F64, {"state_dtype": "int8"}),
    "fp32, states int4": (F32, {"state_dtype": "int4"}),
    "bf16 stochastic, states int8": (BF16, {"param_precision": "stochastic", "state_dtype": "int8"}),
    "fp16 stochastic, states int4": (F16, {"param_precision": "stochastic", "state_dtype": "int4"}),
    "bf16 split32, states int8": (BF16, {"param_precision": "split32", "state_dtype": "int8"}),
    **{
        f"{name} {precision}": (dtype, {"param_precision": precision})
        for name, dtype in (("bf16", BF16), ("fp16", F16))
        for precision in ("kahan", "split24", "split32", "master")
    },
    "fp32, average": (F32, {"ema_decay": 0.9}),
    "fp32, average in bf16": (F32, {"ema_decay": 0.9, "ema_dtype": BF16}),
    "bf16 split32, average": (BF16, {"param_precision": "split32", "ema_decay": 0.9}),
}
NUMELS = (1, 7, 0, 1024, 1027)
CODED_NUMELS = (7, 4099)  # states of fewer than 4,096 elements are not quantized


class Training(NamedTuple):
    """A few steps of an optimizer.

    Attributes:
        options: of the optimizer.
        dtype: of parameters and gradients.
        numels: of the parameters.
        offset: elements by which parameters and gradients lie beyond an address that is a multiple of 64.
        scale: of the gradients. `bad`: what some elements of them are instead, in the last step.
    """

    cls: Any
    options: dict[str, Any]
    dtype: torch.dtype = F32
    numels: tuple[int, ...] = NUMELS
    steps: int = 2
    offset: int = 0
    scale: float = 1.0
    bad: float | None = None

    def run(self, backend: str, wide: bool = False) -> dict[str, Tensor]:
        """The parameters and states at the end, by number and name. `wide`: the same, all in float64."""
        random = torch.Generator().manual_seed(0)
        params = [Parameter(self._tensor(random, numel, 1.0, wide)) for numel in self.numels]
        optimizer = self.cls(params, **self.options, backend=backend)
        for step in range(self.steps):
            for p in params:
                p.grad = self._tensor(random, p.numel(), self.scale, wide).view_as(p)
                if self.bad is not None and step == self.steps - 1:
                    p.grad.view(-1)[::300] = self.bad
            optimizer.step()
        found = {f"{i}.p": p.detach() for i, p in enumerate(params)}
        for i, p in enumerate(params):
            states = optimizer.state[p].items()
            found |= {f"{i}.{name}": value for name, value in states if isinstance(value, Tensor)}
        return found

    def _tensor(self, random: torch.Generator, numel: int, scale: float, wide: bool) -> Tensor:
        value = (torch.randn(numel, generator=random, dtype=F64) * scale).to(self.dtype)
        if wide:
            return value.double()
        # What lies around a view belongs to no tensor that is alive.
        return torch.empty(numel + self.offset, dtype=self.dtype)[self.offset :].copy_(value)

    def eagerly(self) -> dict[str, Tensor]:
        with rounded_once():
            return self.run("eager")

    def exactly(self) -> dict[str, Tensor]:
        """Eagerly in float64, without what makes a state less precise."""
        options = {k: v for k, v in self.options.items() if k not in ("state_dtype", "param_precision", "ema_dtype")}
        return self._replace(options=options).run("eager", wide=True)


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, int]:
    """How many elements of each tensor differ. NaNs are equal."""
    assert ours.keys() == theirs.keys()
    counts = {}
    for name, x in ours.items():
        y = theirs[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        if different := int(((x != y) & ~((x != x) & (y != y))).sum()):
            counts[name] = different
    return counts


def errors(values: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """By role, the root mean square of the distance to what is exact."""
    sums: dict[str, list[Tensor]] = {}
    for name, x in values.items():
        if name in exact and x.is_floating_point():
            sums.setdefault(name.split(".")[1], []).append((x.double() - exact[name].double()).flatten())
    return {role: float(torch.cat(parts).square().mean().sqrt()) for role, parts in sums.items()}


@contextmanager
def rounded_once() -> Iterator[None]:
    """Eager steps in which each result is the nearest number. torch divides a number by a tensor by multiplying it with
    the reciprocal, which rounds twice.
    """
    with nearest_roots(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__rtruediv__", lambda x, number: torch.full_like(x, number) / x)
        yield


@contextmanager
def executing(target: str = "sm_90") -> Iterator[Executor]:
    """Kernels are compiled for this target, and launches are executed."""
    executor = Executor()
    stub_driver.install(target, executor)
    yield executor
    stub_driver.install()


@contextmanager
def unfused(options: Callable[..., dict[str, Any]] = multi_tensor.launch_options) -> Iterator[None]:
    """Steps are compiled without contraction to fused multiply-adds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_tensor, "launch_options", lambda *given: options(*given) | {"enable_fp_fusion": False})
        yield
