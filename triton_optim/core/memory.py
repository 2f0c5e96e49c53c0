"""How much memory training takes, and what of it an optimizer's options save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..precision.codecs import parameter_codec, plain, state_codec
from ..spec import offloads
from ..util.layout import local, with_local
from ..util.table import readable_bytes, table
from .unwrap import unwrap_optimizer


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that training keeps; prints as a table.

    Attributes:
        parameters: how many elements they have.
        weights, gradients: bytes of these.
        states: bytes of each state, by name.
        corrections: bytes of what ``param_precision`` keeps beside the parameters.
        torch_states: bytes of the states of torch's own, which keeps them in the parameter's dtype.
        staging: bytes of host memory through which offloaded parameters and gradients go.
        host: bytes of all this that ``offload`` keeps in host memory: states, corrections and staging.
    """

    parameters: int
    weights: int
    gradients: int
    states: dict[str, int]
    corrections: int
    torch_states: dict[str, int]
    staging: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.gradients + sum(self.states.values()) + self.corrections + self.staging

    @property
    def device(self) -> int:
        """Bytes beside the parameters: of everything but what is in host memory."""
        return self.total - self.host

    @property
    def torch_total(self) -> int:
        """Bytes of everything with torch's own optimizer."""
        return self.weights + self.gradients + sum(self.torch_states.values())

    @property
    def kept(self) -> int:
        """Bytes of everything but the gradients, which need not outlive the step."""
        return self.total - self.gradients

    def parts(self, torchs: bool = False) -> dict[str, float]:
        """Bytes a parameter of each part that there is, in the order of a picture.

        Args:
            torchs: with torch's own optimizer.
        """
        states = self.torch_states if torchs else self.states
        every = {"weights": self.weights, "gradients": self.gradients, **states}
        if self.corrections and not torchs:
            every["corrections"] = self.corrections
        return {name: nbytes / max(self.parameters, 1) for name, nbytes in every.items()}

    def __repr__(self) -> str:
        rows = [("weights", self.weights, self.weights), ("gradients", self.gradients, self.gradients)]
        rows += [(name, nbytes, self.torch_states[name]) for name, nbytes in self.states.items()]
        rows += [("corrections", self.corrections, 0)]
        rows += [("staging", self.staging, 0)] * bool(self.host)
        rows += [("total", self.total, self.torch_total)]
        rows += [("in host memory", self.host, 0), ("on the device", self.device, self.torch_total)] * bool(self.host)
        rows += [("without gradients", self.kept, self.torch_total - self.gradients)]
        count = max(self.parameters, 1)
        cells = [
            [what, f"{ours / count:.3f}", f"{theirs / count:.3f}", readable_bytes(ours), readable_bytes(theirs)]
            for what, ours, theirs in rows
        ]
        return table(["", "bytes/parameter", "torch's", "in all", "torch's"], cells)


def gibibytes(nbytes: int) -> str:
    """A number of bytes in GiB."""
    return f"{nbytes / 2**30:,.3f}"


def memory_report(optimizer: Optimizer) -> MemoryReport:
    """What training with `optimizer` keeps in memory on this process, beside the same with torch's own optimizer.

    It is computed from the parameters and options, so that it may be asked for before the first step, and of parameters
    on the meta device. Parameters that require no gradient are not counted. Nor are activations, and what is only there
    during a step.

    Example:
        >>> import torch, triton_optim
        >>> model = torch.nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)
        >>> optimizer = triton_optim.AdamW(model.parameters(), state_dtype="int8", param_precision="stochastic")
        >>> report = triton_optim.memory_report(optimizer)
        >>> round(report.total / report.parameters, 2), round(report.torch_total / report.parameters, 2)
        (6.03, 8.0)
    """
    optimizer = unwrap_optimizer(optimizer)
    sums = {"parameters": 0, "weights": 0, "gradients": 0, "corrections": 0, "staging": 0, "host": 0}
    states: dict[str, int] = {}
    torch_states: dict[str, int] = {}

    def add(name: str, ours: int, theirs: int) -> None:
        states[name] = states.get(name, 0) + ours
        torch_states[name] = torch_states.get(name, 0) + theirs

    def kept() -> int:
        return sum(states.values()) + sums["corrections"] + sums["staging"]

    for group in optimizer.param_groups:
        variant, before = optimizer.running_variant(group), kept()
        for p in filter(attrgetter("requires_grad"), group["params"]):
            own = local(p)
            numel, codec = own.numel(), parameter_codec(group, p.dtype)
            sums["parameters"] += numel
            sums["weights"] += own.nbytes
            gradient = numel * (p.dtype if p.grad is None else p.grad.dtype).itemsize
            sums["gradients"] += gradient
            sums["staging"] += (own.nbytes + gradient) * offloads(group)
            sums["corrections"] += nbytes(codec.dtypes[1:], codec.elements_per_item[1:], numel)
            for name in variant.state_names:
                wanted = state_codec(optimizer, group, name, p)
                add(
                    name,
                    nbytes(wanted.dtypes, wanted.elements_per_item, numel),
                    nbytes(plain(p.dtype).dtypes, (1,), numel),
                )
            if variant.staged:
                like = with_local(p, torch.empty(own.shape, dtype=p.dtype, device="meta"))
                for name, value in optimizer.first_kept(like, group).items():
                    ours = theirs = local(value).nbytes
                    if name in optimizer.coded_names and variant.prologue:
                        wanted = state_codec(optimizer, group, name, p)
                        ours = nbytes(wanted.dtypes, wanted.elements_per_item, numel)
                    add(name, ours, theirs)
        sums["host"] += (kept() - before) * offloads(group)
    return MemoryReport(**sums, states=states, torch_states=torch_states)


def nbytes(dtypes: tuple[torch.dtype, ...], per_item: tuple[int, ...], numel: int) -> int:
    """Bytes of parts, of which a block that is not full takes as much as one that is."""
    block_size = max(per_item, default=1)
    padded = -(-numel // block_size) * block_size
    return sum(dtype.itemsize * padded // items for dtype, items in zip(dtypes, per_item, strict=True))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that any optimizer keeps, in whatever its states are made of; each memory counted once."""
    found: dict[Any, int] = {}

    def visit(value: Any) -> None:
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                visit(getattr(value, name))
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for part in value.values():
                visit(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                visit(part)

    for state in optimizer.state.values():
        visit(state)
    return sum(found.values())


def meta_parameter(numel: int, dtype: torch.dtype) -> Tensor:
    """A parameter of about so many elements without memory: a matrix, as most of a model's are."""
    columns = 4096
    return torch.nn.Parameter(torch.empty(max(round(numel / columns), 1), columns, dtype=dtype, device="meta"))
