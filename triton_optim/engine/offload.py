"""Steps on the host of parameters that lie elsewhere: the only owner of the host memory that stands for them.

The step's arithmetic is done by buckets of the host, of slots whose parameters are host memory. Of each stretch of a
bucket the gradients come over, the stretch is stepped, and the parameters go back. All that comes over is asked for at
the start, so that both ways and the arithmetic go on beside each other. Nothing of a parameter is kept on the host from
one step to the next: it comes over with its gradient, unless a copy in float32 is kept of it, which the step reads in
its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..buckets.bucket import Bucket
from ..buckets.key import Key
from ..buckets.slots import ParamSlot
from ..buckets.step_scalars import StepScalars
from ..util.layout import flat, has_memory, in_layout_of, is_sharded, is_wrapper, layout, local, with_local
from ..util.link import Link, host_memory

Gradients = Sequence[Tensor | None] | Mapping[int, Tensor | None]


class Twin:
    """The host memory of a parameter and its gradient.

    Attributes:
        given: the gradient of this step, where the parameter is, laid out as it; None where there is none.
        read: whether the step reads the parameter, and not only what is kept of it.
    """

    def __init__(self, key: Key, m: ParamSlot) -> None:
        value = local(m.param).detach()
        self.param, self.host, self._kind = m.param, host_memory(value), kind_of(value)
        m.p = with_local(m.param.detach(), self.host)
        self.dense = layout(value) == "dense"
        self.read = key.codecs[0].name != "master"
        self.gradient_dtype = key.gradient
        self.given: Tensor | None = None
        self._gradient: Tensor | None = None
        self._lain: dict[str, Tensor] = {}  # of this step, by their names here, as they lie in memory
        self.host.copy_(value)  # states may start with it

    @property
    def value(self) -> Tensor:
        """The parameter where it is now, outside autograd."""
        return local(self.param).detach()

    @property
    def gradient(self) -> Tensor:
        """The host memory of the gradient, made for the first."""
        if self._gradient is None:
            self._gradient = host_memory(self.value, self.gradient_dtype)
        return self._gradient

    def begin(self) -> None:
        """Forget the last step's gradient."""
        self.given = None
        self._lain = {}

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of ``"given"``, ``"gradient"``, ``"value"`` or ``"host"``, as they lie in memory; all of one with
        gaps.
        """
        t = self._lain.get(name)
        if t is None:
            t = self._lain[name] = flat(getattr(self, name)) if self.dense else getattr(self, name)
        return t[start:stop] if self.dense else t

    def fits(self, g: Tensor | None) -> bool:
        """Whether the parameter is of the kind that the host memory is for, and a (local) gradient, too."""
        value = self.value
        if kind_of(value) != self._kind or not (value.numel() == 0 or has_memory(value)):
            return False
        if g is None:
            return True
        plain = g.layout == torch.strided and not is_sharded(g) and not is_wrapper(g)
        known = (g.shape, g.dtype, g.device) == (value.shape, self.gradient_dtype, value.device)
        return plain and known and (g.numel() == 0 or has_memory(g))


class Offload:
    """The parameters of a plan that are stepped on the host, and the way there and back.

    Args:
        slots: by bucket. Those that are offloaded get host memory in the place of their parameters.
    """

    def __init__(self, slots: Mapping[Key, list[ParamSlot]]) -> None:
        own = [(key, m) for key, slots_of_one in slots.items() if key.home is not None for m in slots_of_one]
        self._twins = {m.index: Twin(key, m) for key, m in own}
        self._links = {home: link_to(home) for home in dict.fromkeys(key.home for key, _ in own if key.home)}
        self._arrivals: dict[Bucket, list[Callable[[], object]]] = {}

    def write_back(self, slots: Mapping[Key, list[ParamSlot]]) -> None:
        """Bring parameters that were converted with what is kept beside them to where they are."""
        for key, own in slots.items():
            for m in own if key.home is not None and key.codecs[0].suffixes else ():
                twin = self._twins[m.index]
                twin.value.copy_(twin.host)

    def bind(self, gradients: Gradients) -> Gradients | None:
        """The gradients with host memory in the place of those to come over; None where one does not fit."""
        found: list[Tensor | None] | dict[int, Tensor | None]
        found = dict(gradients) if isinstance(gradients, Mapping) else list(gradients)
        for index, twin in self._twins.items():
            g = gradients[index]
            if not twin.fits(g):
                return None
            twin.begin()
            if g is not None:
                found[index] = twin.gradient
                plain = g.resolve_neg().resolve_conj()
                twin.given = in_layout_of(twin.value, plain) if twin.dense else plain
        return found

    def given(self, bucket: Bucket) -> list[Tensor | None]:
        """The gradients of a bucket's parameters in this step, where the parameters are."""
        return [self._twins[index].given for index in bucket.indices]

    @contextmanager
    def copying(self, buckets: Iterable[Bucket]) -> Iterator[None]:
        """Begin to copy what the step of these buckets needs, in their order. On leaving, the devices wait for all that
        was copied.
        """
        own = [bucket for bucket in buckets if bucket.key.home is not None]
        try:
            for link in self._links.values():
                link.begin()
            for bucket in own:
                link = self._links[bucket.key.home]  # type: ignore[index]
                self._arrivals[bucket] = [link.over(self._over(bucket, stretch)) for stretch in bucket.stretches]
            yield
        finally:
            for link in self._links.values():
                link.end()
            self._arrivals = {}

    def let_go(self) -> None:
        """Hold no gradients until the next are bound."""
        for twin in self._twins.values():
            twin.begin()

    def wait(self) -> None:
        """Wait until all is here."""
        for arrivals in self._arrivals.values():
            for arrive in arrivals:
                arrive()

    def run(self, bucket: Bucket, rows: list[StepScalars | None]) -> None:
        """Step a bucket as its stretches arrive, and send each back."""
        arrivals, stretches = self._arrivals[bucket], bucket.stretches
        link = self._links[bucket.key.home]  # type: ignore[index]
        bucket.run_stretches(
            rows,
            before=lambda number: arrivals[number](),
            after=lambda number: link.back(self._back(bucket, stretches[number])),
        )

    def _over(self, bucket: Bucket, stretch: list[tuple[int, int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        averaged = bucket.key.variant.averaged
        for position, start, stop in stretch:
            twin = self._twins[bucket.indices[position]]
            if twin.given is not None:
                yield twin.part("gradient", start, stop), twin.part("given", start, stop)
            # What stays counts in its average.
            if twin.read and (averaged or twin.given is not None):
                yield twin.part("host", start, stop), twin.part("value", start, stop)

    def _back(self, bucket: Bucket, stretch: list[tuple[int, int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for position, start, stop in stretch:
            twin = self._twins[bucket.indices[position]]
            if twin.given is not None:
                yield twin.part("value", start, stop), twin.part("host", start, stop)


def link_to(device: torch.device) -> Link:
    """The way between a device and the host."""
    return Link(device)


def kind_of(value: Tensor) -> tuple[Any, ...]:
    """What the host memory of a tensor depends on."""
    return value.shape, value.stride(), value.dtype, value.device
