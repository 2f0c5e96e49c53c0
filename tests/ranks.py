"""The fixture `ranks`: two processes over gloo, which all tests of several processes share."""

import datetime
import os
import queue
import time
import traceback
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def serve(rank, path, tasks, results):
    """What a rank does: run functions of test modules, by name, until there are no more."""
    torch.set_num_threads(1)
    import_module("conftest")  # which patches what tests compare
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    mesh = init_device_mesh("cpu", (2,))
    while (task := tasks.get()) is not None:
        module, name, arguments = task
        try:
            torch.manual_seed(0)
            results.put((None, getattr(import_module(module), name)(mesh, *arguments)))
        except Exception:
            results.put((traceback.format_exc(), None))
            break
    dist.destroy_process_group()


class Ranks:
    """Two processes over gloo, on the CPU; started anew after a failure."""

    def __init__(self, folder):
        self.folder, self.started, self.processes = folder, 0, []

    def start(self):
        context = torch.multiprocessing.get_context("spawn")
        self.started += 1
        self.tasks, self.results = ([context.Queue() for _ in range(2)] for _ in range(2))
        path = self.folder / f"store-{self.started}"
        self.processes = [
            context.Process(target=serve, args=(rank, path, self.tasks[rank], self.results[rank]), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments):
        """What both ranks return for ``function(mesh, *arguments)``."""
        if not self.processes:
            self.start()
        for tasks in self.tasks:
            tasks.put((function.__module__, function.__name__, arguments))
        answers = [self.answer(rank, since=time.monotonic()) for rank in range(2)]
        if any(error for error, _ in answers):
            self.stop()
            pytest.fail("\n".join(f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers)))
        return [answer for _, answer in answers]

    def answer(self, rank, since):
        """(why there is no answer or None, the answer)."""
        while time.monotonic() < since + 180:
            alive = self.processes[rank].is_alive()
            try:
                return self.results[rank].get(timeout=1)
            except queue.Empty:
                if not alive:
                    return f"died with exit code {self.processes[rank].exitcode}", None
        return "no answer in 180 s: the ranks wait for each other", None

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two processes, once for all files; conftest.py makes it known to them."""
    before = {name: os.environ.get(name) for name in ("TRITON_INTERPRET", "GLOO_SOCKET_IFNAME")}
    os.environ["TRITON_INTERPRET"] = "1"  # the tensors lie on the CPU, whatever else the machine has
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name may not resolve
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    try:
        ranks.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    yield ranks
    for tasks in ranks.tasks:
        tasks.put(None)
    for process in ranks.processes:
        process.join(timeout=20)
    ranks.stop()
