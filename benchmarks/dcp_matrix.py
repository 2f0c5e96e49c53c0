"""Are checkpoints of sharded training right on any number of ranks? ``python benchmarks/dcp_matrix.py``.

Every optimizer is trained with its parameters cut along their rows over 1, 2 and 4 processes (gloo), saved by
torch.distributed.checkpoint, and loaded on 1, 2 and 4. Where they are as many, parameters, states and two more steps
must be the same bit for bit. Else what was loaded must be what was saved; of codes, whose blocks are others, within one
rounding of the codec. Each option is taken by itself, and all together; of AdamW, or with ``--all`` of every optimizer,
each with each other. Flat optimizer states go from 2 ranks to 4 and 1, and AdamW's are saved asynchronously, too.
"""

from __future__ import annotations

import argparse
import datetime
import os
import queue
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ["TRITON_INTERPRET"] = "1"  # read by conftest.py
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
from resharding import EVERY, RULES, SOME, Kept, Outcome, outcomes
from torch.distributed.device_mesh import DeviceMesh

from triton_optim.bench.records import Record, write_records

QUESTION = "dcp_matrix"
RANKS = (1, 2, 4)
PAIRS = {"nested": list(product(RANKS, RANKS)), "flat": [(2, 4), (2, 1)], "async": [(2, 2), (2, 4)]}
REFUSED = "param_precision", "state_dtype", "ema_decay", "complex"


@dataclass
class Found:
    """What came of the optimizers whose values are kept in one way."""

    cases: int = 0
    good: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # by the optimizer
    same: float = 0.0  # how far anything is apart where the ranks are as many
    values: float = 0.0  # how far what was loaded is apart where they are not
    roundings: float = 0.0  # the same, in roundings of the codec
    later: float = 0.0  # how far training is apart after two more steps

    def add(self, name: str, pair: tuple[int, int], one: Outcome) -> None:
        self.cases += 1
        self.good += one.good
        if not one.good:
            self.bad[f"{name}, {pair[0]} to {pair[1]}"] = f"{one.values:.3g}, later {one.later:.3g}"
        if one.as_many:
            self.same = max(self.same, one.values, one.later)
        else:
            self.values, self.later = max(self.values, one.values), max(self.later, one.later)
            if one.allowed:
                self.roundings = max(self.roundings, one.values / one.allowed)

    def record(self, kept: str) -> Record:
        same = "bit for bit" if self.same == 0 else f"apart by {self.same:.3g}"
        other = (
            f"within {self.roundings:.2g} roundings of the codec"
            if self.roundings
            else "bit for bit"
            if self.values == 0
            else f"apart by {self.values:.3g}"
        )
        text = f"{self.good} of {self.cases} right; on as many ranks {same}, on others loaded {other}"
        text += f"; refused by {', '.join(self.refused)}" if self.refused else ""
        return Record(QUESTION, kept, text, self.__dict__.copy(), len(self.bad), 0)


def cases(every: bool, only: str) -> Iterator[tuple[Kept, str, str]]:
    """How values are kept, the optimizer's name, and how it is saved."""
    for kept in EVERY:
        for name in RULES:
            if kept in SOME or every or name == "AdamW":
                for how in PAIRS:
                    if (how != "async" or name == "AdamW") and only in f"{name}, {kept}, {how}":
                        yield kept, name, how


def serve(rank: int, folder: str, every: bool, only: str, results: Any) -> None:
    """What a rank does; the first puts what came of each case."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=300)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(RANKS), timeout=limit
    )
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in RANKS}
    for number, (kept, name, how) in enumerate(cases(every, only)):
        own: Any
        try:
            own = outcomes(RULES[name], kept, meshes, Path(folder) / f"{number}", PAIRS[how], how)
        except (RuntimeError, ValueError) as error:
            own = str(error)
            if not any(option in own for option in REFUSED):  # the ranks may no longer be in step
                results.put((kept, name, how, f"{type(error).__name__}: {own}"))
                raise
        if rank == 0:
            results.put((kept, name, how, own))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="a folder for dcp_matrix.json")
    parser.add_argument("--all", action="store_true", help="each option with each other, of every optimizer")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    args = parser.parse_args()
    started = time.monotonic()
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    found: dict[str, Found] = {}
    wanted = list(cases(args.all, args.only))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=serve, args=(rank, folder, args.all, args.only, results), daemon=True)
            for rank in range(max(RANKS))
        ]
        for rank in ranks:
            rank.start()
        for number in range(len(wanted)):
            while True:
                try:
                    kept, name, how, own = results.get(timeout=1)
                    break
                except queue.Empty:
                    if not any(rank.is_alive() for rank in ranks):
                        sys.exit(f"the ranks died in {', '.join(map(str, wanted[number]))}")
            mine = found.setdefault(str(kept), Found())
            if isinstance(own, str):
                if own.startswith(("RuntimeError", "ValueError")):
                    sys.exit(f"{name}, {kept}, {how}: {own}")
                mine.refused[name] = own
                continue
            for pair, one in own.items():
                mine.add(f"{name}, {how}", pair, one)
        for rank in ranks:
            rank.join()
    records = [own.record(kept) for kept, own in found.items()]
    for record in records:
        print(record.line())
        for name, apart in record.figures["bad"].items():
            print(f"    {name}: {apart}")
    if args.results is not None:
        write_records(args.results, records, torch.device("cpu"))
    print(f"{len(wanted)} cases in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
