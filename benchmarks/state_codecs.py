"""What quantized states cost in loss: ``python benchmarks/state_codecs.py --processes 2``.

A character-level transformer of a million parameters learns the sources of Python's standard library with AdamW, Lion
and SGD, whose states are kept in float32, in int8 and in int4 codes, from several seeds. A seed gives every codec the
same weights to begin with and the same batches. Final losses, on the training text (mean of the last steps) and on
files held out, are compared with float32's. Every finished run is written to the results at once, and a run that is
there with the same settings is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import string
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import triton_optim
from triton_optim.bench.records import Record, write_records

QUESTION = "state_codecs"
RESULTS = Path(__file__).parent / "results"

STEPS, WARM_UP, LAST, LOWEST_LR = 500, 50, 50, 0.1
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 144, 4, 64, 12
VALIDATION_WINDOWS, HOLD_OUT_EVERY = 512, 20
VOCABULARY = string.printable

BASE = "fp32"
STATE_DTYPES: dict[str, str | None] = {BASE: None, "int8": "int8", "int4": "int4"}
TARGETS = {"int8": 1.01, "int4": 1.03}  # times float32's loss
LOSSES = ("training loss", "validation loss")


class Choice(NamedTuple):
    """An optimizer and the learning rate at which it trains this model well in float32."""

    make: Callable[..., torch.optim.Optimizer]
    lr: float
    options: dict[str, float]


OPTIMIZERS = {
    "AdamW": Choice(triton_optim.AdamW, 1e-3, {"weight_decay": 0.01}),
    "Lion": Choice(triton_optim.Lion, 3e-4, {"weight_decay": 0.1}),
    "SGD": Choice(triton_optim.SGD, 0.1, {"momentum": 0.9}),
}


@dataclass(frozen=True)
class Run:
    """Everything that a run's result depends on."""

    optimizer: str
    codec: str
    seed: int
    lr: float
    steps: int = STEPS
    layers: int = LAYERS
    width: int = WIDTH
    heads: int = HEADS
    context: int = CONTEXT
    batch: int = BATCH


class Block(nn.Module):
    """Attention and a perceptron, each of the normalized stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = self.down(functional.gelu(self.up(self.before_perceptron(x))))
        return x + hidden


class Transformer(nn.Module):
    """The logits of each next character."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(VOCABULARY), run.width)
        self.positions = nn.Embedding(run.context, run.width)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block(run.width, run.heads) for _ in range(run.layers)))
        self.norm, self.head = nn.LayerNorm(run.width), nn.Linear(run.width, len(VOCABULARY), bias=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


@cache
def texts() -> tuple[Tensor, Tensor]:
    """The standard library as numbers of characters: what is trained on, and every `HOLD_OUT_EVERY`-th file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not {"site-packages", "test", "tests"} & set(name.split("/"))]
    return encoded(root, (name for i, name in enumerate(names) if i % HOLD_OUT_EVERY)), encoded(
        root, names[::HOLD_OUT_EVERY]
    )


def encoded(root: Path, names: Iterable[str]) -> Tensor:
    """The files one after another, without what is not in the vocabulary."""
    known = VOCABULARY.encode()
    others = bytes(set(range(256)) - set(known))
    raw = b"".join((root / name).read_bytes() for name in names).translate(None, others)
    numbers = torch.zeros(256, dtype=torch.long)
    numbers[list(known)] = torch.arange(len(known))
    return numbers[torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()]


def windows(text: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    """Random pieces of the text, each with one character more than the context."""
    starts = torch.randint(len(text) - context, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    return functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def schedule(step: int, steps: int) -> float:
    """Linear up, then down along a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    progress = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LOWEST_LR + (1 - LOWEST_LR) * (1 + math.cos(math.pi * progress)) / 2


def bytes_of_states(optimizer: torch.optim.Optimizer) -> int:
    """Of all states of more than one element: steps are no states to be coded."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, Tensor) and value.numel() > 1)


def train(run: Run) -> dict[str, float]:
    """The final losses of a run, and what it took."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    training, held_out = texts()
    torch.manual_seed(run.seed)
    model = Transformer(run)
    choice = OPTIMIZERS[run.optimizer]
    optimizer = choice.make(model.parameters(), lr=run.lr, state_dtype=STATE_DTYPES[run.codec], **choice.options)
    batches = torch.Generator().manual_seed(run.seed)
    losses: list[float] = []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * schedule(step, run.steps)
        loss = loss_of(model, windows(training, run.batch, run.context, batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    pieces = windows(held_out, VALIDATION_WINDOWS, run.context, torch.Generator().manual_seed(0))
    with torch.no_grad():
        validation = mean(loss_of(model, part).item() for part in pieces.split(64))
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "training loss": mean(losses[-LAST:]),
        "validation loss": validation,
        "bytes of states per parameter": bytes_of_states(optimizer) / parameters,
        "seconds": time.perf_counter() - start,
    }


Finished = dict[Run, dict[str, float]]


def records_of(finished: Finished) -> Iterator[Record]:
    """An answer for each optimizer and codec, from the seeds that it shares with float32."""
    for name, codec in product(OPTIMIZERS, STATE_DTYPES):
        own = {run: result for run, result in finished.items() if (run.optimizer, run.codec) == (name, codec)}
        if not own:
            continue
        runs = [asdict(run) | result for run, result in own.items()]
        figures: dict[str, Any] = {f"mean {loss}": mean(result[loss] for result in own.values()) for loss in LOSSES}
        text = ", ".join(f"{loss} {figures[f'mean {loss}']:.4f}" for loss in LOSSES)
        record = Record(QUESTION, f"{name}, states in {codec}, character model of 1M", text, figures)
        pairs = [(result, base) for run, result in own.items() if (base := finished.get(replace(run, codec=BASE)))]
        if codec != BASE and pairs:
            for loss in LOSSES:
                own_mean, base_mean = (mean(result[loss] for result in results) for results in zip(*pairs, strict=True))
                figures[f"ratio of {loss}"] = own_mean / base_mean
            ratios = [figures[f"ratio of {loss}"] for loss in LOSSES]
            record.text += f"; {' and '.join(f'{ratio:.4f}' for ratio in ratios)} x {BASE}'s, {len(pairs)} seeds"
            record.value, record.target = max(ratios), TARGETS[codec]
        figures["runs"] = runs
        yield record


def read_finished(folder: Path) -> Finished:
    """The runs that are in the results, whatever their settings."""
    path = folder / f"{QUESTION}.json"
    if not path.exists():
        return {}
    finished: Finished = {}
    settings = Run.__dataclass_fields__
    for record in json.loads(path.read_text())["records"]:
        for entry in record["figures"]["runs"]:
            run = Run(**{name: entry[name] for name in settings})
            finished[run] = {name: value for name, value in entry.items() if name not in settings}
    return finished


def table_of(records: Iterable[Record]) -> Table:
    table = Table(title="Final loss by codec of the states; means over the seeds")
    for heading in ("states in", "bytes", "training", "x fp32", "held out", "x fp32", "target", ""):
        table.add_column(heading, justify="left" if heading == "states in" else "right", no_wrap=True)
    for record in records:
        figures = record.figures
        losses = [
            cell
            for loss in LOSSES
            for cell in (f"{figures[f'mean {loss}']:.4f}", f"{figures.get(f'ratio of {loss}', 1):.4f}")
        ]
        size = mean(run["bytes of states per parameter"] for run in figures["runs"])
        target = "" if record.target is None else f"{record.target:g}"
        verdict = {True: "met", False: "NOT MET", None: ""}[record.met]
        table.add_row(
            record.case.partition(", character")[0].replace(", states in", ""),
            f"{size:.2f}",
            *losses,
            target,
            verdict,
            end_section="int4" in record.case,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--codecs", nargs="+", choices=STATE_DTYPES, default=list(STATE_DTYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, each on one thread")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    wanted = [
        Run(name, codec, seed, OPTIMIZERS[name].lr, arguments.steps)
        for seed, name, codec in product(arguments.seeds, arguments.optimizers, arguments.codecs)
    ]
    # Results of other settings are not comparable: they go with the first new run.
    settings = {replace(run, codec=BASE, seed=0) for run in wanted}
    finished = {
        run: result
        for run, result in read_finished(arguments.results).items()
        if run.optimizer not in arguments.optimizers or replace(run, codec=BASE, seed=0) in settings
    }
    missing = [run for run in wanted if run not in finished]

    console = Console()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        futures = {pool.submit(train, run): run for run in missing}
        for future in as_completed(futures):
            run, result = futures[future], future.result()
            finished[run] = result
            finished = dict(sorted(finished.items(), key=lambda item: item[0].seed))
            write_records(arguments.results, list(records_of(finished)), torch.device("cpu"))
            losses = ", ".join(f"{loss} {result[loss]:.4f}" for loss in LOSSES)
            console.print(f"{run.optimizer}, {run.codec}, seed {run.seed}: {losses} in {result['seconds']:.0f} s")
    console.print(table_of(records_of(finished)))


if __name__ == "__main__":
    main()
