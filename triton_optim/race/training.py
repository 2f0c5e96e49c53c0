"""One run: a training, measured."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from ..core.memory import state_bytes
from ..optimizers.closure.closure_driven import ClosureOptimizer
from ..util.devices import moved
from .contestants import estimates_hessian
from .records import DIVERGED, FINISHED, PRUNED, Record, Run
from .schedules import Schedule
from .task import Task, forever

HESSIAN_EVERY = 10  # steps of SophiaG, as in its paper
JUDGEMENTS = 30  # validations in a run, beside the one before the first step
Judged = Callable[[int, float], bool]  # after a validation: (steps, loss) -> whether to end the run


def train(run: Run, task: Task, schedule: Schedule, steps: int, device: torch.device, judged: Judged) -> Record:
    """Train the task's model, and record it.

    Every random number depends on the run's seed and the step alone, so that optimizers see the same batches.

    Args:
        run: who trains, and from which learning rate.
        task: made for the run's seed, used for this run alone.
        schedule: gives the schedule of the learning rate.
        steps: optimizer steps.
        device: where to train.
        judged: is called after every validation; if it gives True, the run ends as pruned.
    """
    with threads(task.threads), torch.random.fork_rng():
        model = task.model.to(device).train()
        optimizer = run.contestant.optimizer(task, run.lr)
        scheduler = schedule(optimizer, steps)
        if callable(warmup := getattr(optimizer, "warmup", None)):
            warmup()
        turn = Turn(model, optimizer, task, device)
        batches = forever(task.batches)
        # torch.manual_seed walks the stack for devices that are not in use, which takes as long as a small step.
        reseed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        every = max(1, steps // JUDGEMENTS)
        losses: list[float] = []
        lrs: list[float] = []
        seconds, validation = [0.0], [turn.validation_loss()]
        judged_at, status = [0], FINISHED
        for step in range(steps):
            reseed(1_000_003 * run.seed + step)
            lrs.append(float(optimizer.param_groups[0]["lr"]))
            loss = turn.step(batches)
            if not math.isfinite(loss):
                status = DIVERGED
                break
            losses.append(loss)
            scheduler.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                value = turn.validation_loss()
                if not math.isfinite(value):
                    status = DIVERGED
                    break
                judged_at.append(step + 1)
                validation.append(value)
                seconds.append(sum(turn.whole_seconds))
                if judged(step + 1, value) and step + 1 < steps:
                    status = PRUNED
                    break
        return Record(
            optimizer=run.contestant.label,
            schedule=run.schedule,
            lr=run.lr,
            seed=run.seed,
            status=status,
            steps=len(turn.step_seconds),
            losses=losses,
            lrs=lrs,
            judged_at=judged_at,
            validation=validation,
            seconds=seconds,
            step_seconds=turn.step_seconds,
            whole_seconds=turn.whole_seconds,
            state_bytes=state_bytes(optimizer),
            parameters=sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
        )


class Turn:
    """Steps of one optimizer on one task, each timed."""

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer, task: Task, device: torch.device) -> None:
        self.model, self.optimizer, self.task, self.device = model, optimizer, task, device
        self.needs_closure = needs_closure(optimizer)
        self.estimates = estimates_hessian(type(optimizer)) and task.sampled_loss is not None
        self.step_seconds: list[float] = []
        self.whole_seconds: list[float] = []

    def step(self, batches: Iterator[Any]) -> float:
        """Take one step, and give the loss of its batch before it."""
        start = self.now()
        batch = moved(next(batches), self.device)
        evaluating = 0.0
        if self.estimates and len(self.step_seconds) % HESSIAN_EVERY == 0:
            self.estimate(batch)

        def closure() -> torch.Tensor:
            nonlocal evaluating
            began = self.now()
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            evaluating += self.now() - began
            return loss

        loss: Any
        if self.needs_closure:
            stepping = self.now()
            loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            loss = closure()
            stepping, evaluating = self.now(), 0.0
            self.optimizer.step()
        end = self.now()
        self.step_seconds.append(end - stepping - evaluating)
        self.whole_seconds.append(end - start)
        return float(torch.as_tensor(loss).detach())

    def estimate(self, batch: Any) -> None:
        """Give the optimizer a gradient of sampled labels. Random layers then do what they do under the others."""
        optimizer: Any = self.optimizer
        assert self.task.sampled_loss is not None
        optimizer.zero_grad()
        with torch.random.fork_rng():
            self.task.sampled_loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.update_hessian()

    def now(self) -> float:
        """The time at which the device has done all it was told."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean loss of the batches that judge; an optimizer that trains other weights than it ends with is told."""
        parts: list[Any] = [part for part in (self.model, self.optimizer) if hasattr(part, "eval")]
        for part in parts:
            part.eval()
        value = statistics.fmean(
            float(self.task.loss(self.model, moved(batch, self.device))) for batch in self.task.validation
        )
        for part in parts:
            part.train()
        return value


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` evaluates the loss itself, as L-BFGS's: our own kind of these, or one that requires a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return required or isinstance(optimizer, ClosureOptimizer)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Keep torch to `count` CPU threads: small batches gain nothing from more, which wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
