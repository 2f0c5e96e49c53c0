"""Are checkpoints of sharded training right on any number of ranks? ``python benchmarks/dcp_matrix.py``.

Every optimizer is trained with its parameters cut along their rows over 1, 2 and 4 processes (gloo), saved by
torch.distributed.checkpoint, and loaded on 1, 2 and 4. Where they are as many, parameters, states and two more steps
must be the same bit for bit. Else what was loaded must be what was saved; of codes, whose blocks are others, within one
rounding of the codec. AdamW has every ``state_dtype`` with every ``param_precision``, with averages and without; the
others, without ``--all``, four of these. From 2 ranks to 4 and 1 flat optimizer states go, too, and AdamW's that are
saved asynchronously.
"""

from __future__ import annotations

import argparse
import datetime
import os
import queue
import shutil
import sys
import tempfile
import time
import traceback
from collections import defaultdict
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
from resharding import EVERY, RULES, SOME, Job, Kept, Outcome, outcomes
from torch.distributed.device_mesh import DeviceMesh

from triton_optim.bench.records import Record, with_others, write_file

QUESTION = "dcp_matrix"
RANKS = (1, 2, 4)
PAIRS = {"nested": list(product(RANKS, RANKS)), "flat": [(2, 4), (2, 1)], "async": [(2, 2), (2, 4)]}
TOGETHER = 40  # optimizers in a checkpoint


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

    def add(self, name: str, pair: tuple[int, ...], one: Outcome) -> None:
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


def all_jobs(every: bool, rows: str) -> list[Job]:
    """The optimizers, and how each keeps what it keeps."""
    jobs = [
        Job(case, kept) for kept in EVERY for case in RULES.values() if kept in SOME or every or case.name == "AdamW"
    ]
    return [job for job in jobs if rows in str(job.kept)]


def checkpoints(jobs: list[Job]) -> Iterator[tuple[str, dict[str, Job]]]:
    """How each is saved, and the optimizers in it by name."""
    for how in PAIRS:
        own = [job for job in jobs if how != "async" or job.case.name == "AdamW"]
        for start in range(0, len(own), TOGETHER):
            yield how, {f"{job.case.name}, {job.kept}": job for job in own[start : start + TOGETHER]}


def serve(rank: int, folder: str, jobs: list[tuple[str, Kept]], results: Any) -> None:
    """What a rank does; the first puts what came of each checkpoint."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=600)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(RANKS), timeout=limit
    )
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in RANKS}
    made = [Job(RULES[name], kept) for name, kept in jobs]
    for number, (how, own) in enumerate(checkpoints(made)):
        path = Path(folder) / str(number)
        try:
            found = outcomes(own, meshes, path, PAIRS[how], how)
        except Exception:
            results.put(traceback.format_exc())
            raise
        dist.barrier()
        if rank == 0:
            results.put((how, found))
            shutil.rmtree(path)
    dist.destroy_process_group()


def answer(results: Any, ranks: list[Any]) -> tuple[str, dict[tuple[str, int, int], Outcome]]:
    """What came of the next checkpoint."""
    while any(rank.is_alive() for rank in ranks):
        try:
            found = results.get(timeout=1)
        except queue.Empty:
            continue
        if isinstance(found, str):
            sys.exit(found)
        return found  # type: ignore[no-any-return]
    sys.exit("the ranks died")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="a folder for dcp_matrix.json")
    parser.add_argument("--all", action="store_true", help="every option of every optimizer")
    parser.add_argument("--rows", default="", help="rows whose names hold this; of a file the others stay")
    args = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    found: dict[str, Found] = defaultdict(Found)
    jobs = []
    for job in all_jobs(args.all, args.rows):
        if said := job.refusal():
            found[str(job.kept)].refused[job.case.name] = said
        else:
            jobs.append(job)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        told = [(job.case.name, job.kept) for job in jobs]
        ranks = [
            context.Process(target=serve, args=(rank, folder, told, results), daemon=True) for rank in range(max(RANKS))
        ]
        for rank in ranks:
            rank.start()
        for _ in checkpoints(jobs):
            how, own = answer(results, ranks)
            for (name, *pair), one in own.items():
                optimizer, _, kept = name.partition(", ")
                found[kept].add(f"{optimizer}, {how}", tuple(pair), one)
            print(f"{how}: {len(own)} in {time.monotonic() - started:.0f} s", flush=True)
        for rank in ranks:
            rank.join()
    records = [own.record(kept) for kept, own in found.items()]
    for record in records:
        print(record.line())
        for name, apart in record.figures["bad"].items():
            print(f"    {name}: {apart}")
    if args.results is not None:
        path = args.results / f"{QUESTION}.json"
        records, earlier = with_others(path, records) if args.rows else (records, {})
        write_file(path, QUESTION, records, torch.device("cpu"), **earlier)
    print(f"{len(jobs)} optimizers in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
