"""What do the ranks of a fully sharded model send in a step of Muon, and how long does it take, beside torch's Muon?

    python benchmarks/sharded_muon.py --ranks 2 --results benchmarks/results

Matrices of a small transformer, sharded by rows, on gloo. Ours sends each element to the rank that iterates its
matrix and what came of it back; torch.optim.Muon computes on DTensors, whose products gather their operands in every
step of the iteration. Bytes are those that all processes of the machine send over its loopback interface. Steps of
both take turns; after the first, parameters must agree to the precision of torch's iteration, which is in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

import triton_optim
from triton_optim.bench.records import Record, write_file

QUESTION = "sharded_muon"
WIDE = 384
LAYER = [(3 * WIDE, WIDE), (WIDE, WIDE), (4 * WIDE, WIDE), (WIDE, 4 * WIDE)]
RATIO = 1.0  # of our time and of our bytes to torch's


def sent_bytes() -> int:
    """Bytes that all processes have sent over the loopback interface."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def serve(rank: int, ranks: int, layers: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    shapes = LAYER * layers
    torch.manual_seed(0)
    wholes = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]

    def sharded(whole: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    sides = {}
    for name, cls in (("ours", triton_optim.Muon), ("torch", torch.optim.Muon)):
        params = [Parameter(sharded(whole.clone())) for whole in wholes]
        sides[name] = (params, cls(params, lr=0.02))
    times: dict[str, list[float]] = {name: [] for name in sides}
    sent: dict[str, list[int]] = {name: [] for name in sides}
    for k in range(rounds + 1):
        for p, q, whole in zip(sides["ours"][0], sides["torch"][0], wholes, strict=True):
            p.grad = sharded(torch.randn_like(whole))
            q.grad = p.grad.clone()
        for name, (_, optimizer) in sides.items():
            dist.barrier()
            before, start = sent_bytes(), time.perf_counter()
            optimizer.step()
            dist.barrier()
            if k:
                times[name].append(time.perf_counter() - start)
                sent[name].append(sent_bytes() - before)
        if k == 0:
            for p, q in zip(sides["ours"][0], sides["torch"][0], strict=True):
                moved = (p.full_tensor() - q.full_tensor()).norm() / (0.02 * min(p.shape) ** 0.5)
                assert moved < 0.1, f"the updates differ by {moved:.3f} of their size"
    if rank == 0:
        torch.save((times, sent), f"{folder}/found")
    dist.destroy_process_group()


def record_of(ranks: int, layers: int, rounds: int) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(serve, (ranks, layers, rounds, folder), ranks)
        times, sent = torch.load(f"{folder}/found")
    elements = layers * sum(rows * columns for rows, columns in LAYER)
    own, theirs = (median(times[name]) for name in ("ours", "torch"))
    own_bytes, their_bytes = (median(sent[name]) / ranks for name in ("ours", "torch"))
    ratio = own / theirs
    # On paper: dion's Muon sends as ours does. A gather of all momenta everywhere sends each part to every other rank.
    gathered = 4 * elements * (ranks - 1) / ranks
    text = (
        f"{ratio:.2f} x the time of torch's ({1e3 * own:.0f} and {1e3 * theirs:.0f} ms, medians of {rounds}); a rank "
        f"sends {own_bytes / 1e6:.1f} MB, torch's {their_bytes / 1e6:.1f}; to gather all momenta everywhere it would "
        f"send {gathered / 1e6:.1f}"
    )
    figures = {
        "ratio": ratio,
        "seconds": times,
        "bytes of all ranks": sent,
        "bytes of a rank": {"ours": own_bytes, "torch": their_bytes, "gathered, computed": gathered},
        "elements": elements,
    }
    return Record(QUESTION, f"Muon, {ranks} ranks, {layers} layers of {WIDE}", text, figures, ratio, RATIO)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help=f"folder for {QUESTION}.json; nothing is written without it")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found = []
    for ranks in options.ranks:
        found.append(record_of(ranks, options.layers, options.rounds))
        print(found[-1].line(), flush=True)
    if options.results:
        write_file(options.results / f"{QUESTION}.json", QUESTION, found, torch.device("cpu"))


if __name__ == "__main__":
    main()
