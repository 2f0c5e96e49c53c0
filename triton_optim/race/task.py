"""What a race is run on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from .names import RaceError


class Published(NamedTuple):
    """A result that was published for a task, which ours is shown beside.

    Attributes:
        optimizer: the label of the contestant that it is to be compared with, such as ``"sgd(momentum=0.9)"``.
        schedule, lr: under which, and from which learning rate.
        final, spread: mean and standard deviation, over seeds, of the last validation loss.
        source: where it stands.
    """

    optimizer: str
    schedule: str
    lr: float
    final: float
    spread: float
    source: str


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and what judges it. A task of one's own is a function ``task(seed) -> Task``.

    It is called anew for each run. Weights and the order of batches should depend on the seed alone: torch's generator
    is seeded before the call, and again before every batch, so that random layers, and a ``DataLoader`` that shuffles,
    do the same under every optimizer. Model and batches are made on the CPU, and moved to the device of the race.

    Attributes:
        model: what is trained.
        batches: any iterable of batches, such as a ``DataLoader``; begun again at its end.
        loss: ``loss(model, batch)``, the 0-dim loss of one batch.
        validation: the batches that judge: their mean loss counts, with the model in evaluation mode.
        steps: how many optimizer steps a run has, unless the race says otherwise.
        heads: names of the modules that make the output: Muon leaves them to AdamW, see ``muon_param_groups``.
        threads: CPU threads to train with; None leaves torch's number. For small models 1 is fastest by far.
        optimizers, schedules, seeds: what races unless the race says otherwise; seeds are a number.
        lrs: by the names of optimizers, learning rates that do well here, where a search for better ones begins.
        sampled_loss: ``sampled_loss(model, batch)``, the loss with labels that were drawn from what the model says of
            the batch: SophiaG estimates the Hessian by it. Without one its steps are those of the momentum's sign.
        samples: of how many samples, of a language model tokens, a loss is the mean; SophiaG's ``bs``.
        published: results that ours are shown beside, of runs of so many steps.

    Example:
        >>> import torch
        >>> from triton_optim.race import Task, race
        >>> def line(seed):
        ...     x = torch.randn(256, 4)
        ...     batches = list(zip(x.split(32), x.sum(1, keepdim=True).split(32)))
        ...     def loss(model, batch):
        ...         return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        ...     return Task(torch.nn.Linear(4, 1), batches[1:], loss, validation=batches[:1], steps=40, threads=1)
        >>> results = race(line, ["torch.optim:AdamW"], ["constant"], lrs=[1e-3, 1e-1], seeds=2)
        >>> results.standings[0].lr
        0.1
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    validation: Iterable[Any]
    steps: int = 300
    heads: Collection[str] = ()
    threads: int | None = None
    optimizers: Sequence[str] = ()
    schedules: Sequence[str] = ()
    seeds: int = 3
    lrs: Mapping[str, float] = field(default_factory=dict)
    sampled_loss: Callable[[nn.Module, Any], Tensor] | None = None
    samples: int | None = None
    published: Sequence[Published] = ()


MakeTask = Callable[[int], Task]


def forever(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, again and again.

    Raises:
        RaceError: there are none, or none the second time.
    """
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if count == before:
            raise RaceError(
                f"The task's batches ended after {count}, and cannot be begun again. Give a list, a DataLoader, or a "
                "generator that never ends."
            )
