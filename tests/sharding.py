"""Sharded tensors and models; and one process that plays one rank after another of a process group which sends nothing
("fake").
"""

import contextlib

import numpy as np
import torch
import torch.distributed as dist
from references import adamw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = 4
SETTINGS = {"lr": 0.1, "weight_decay": 0.1}


@contextlib.contextmanager
def playing(rank, device, shape=(RANKS,), names=None):
    """The device mesh as `rank` sees it."""
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        yield init_device_mesh(device.type, shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def own_part(full, mesh, placements):
    """What `placements` put on this rank: as torch.chunk cuts it, with nothing left for the last ranks. A strided shard
    is cut from what the dimensions after it have cut.
    """
    for dim, placement in sorted(enumerate(placements), key=lambda pair: isinstance(pair[1], _StridedShard)):
        if isinstance(placement, (Shard, _StridedShard)):
            parts = full.chunk(mesh.size(dim), placement.dim)
            place = mesh.get_local_rank(dim)
            full = parts[place] if place < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


def sharded(full, mesh, placements, lay=torch.clone):
    local = lay(own_part(full, mesh, placements).contiguous())
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def values(shape, seed, device, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def array(t):
    return local(t.detach()).cpu().double().numpy()


def assert_is_reference(opt, params, starts, gradients):
    """Local parts of parameters and states against the float64 reference; eight float32 roundings a step."""
    results, states = adamw(starts, gradients, **SETTINGS)
    tolerance = 8 * len(gradients) * 2**-23
    for i, (p, result, state) in enumerate(zip(params, results, states, strict=True)):
        assert opt.state[p]["step"].item() == state.pop("step")
        for name, expected in {"p": result, **state}.items():
            actual = array(p if name == "p" else opt.state[p][name])
            assert actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, tolerance, tolerance, err_msg=f"{name} of parameter {i}")


class Watch(TorchDispatchMode):
    """Lists the operations that reach a DTensor, and the collectives with what they carry."""

    def __init__(self):
        super().__init__()
        self.on_dtensors, self.collectives = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            self.on_dtensors.append(str(func))
        elif "c10d" in func.namespace and any(word in func.name() for word in ("all", "reduce")):
            carried = [(tuple(t.shape), t.dtype) for t in args if isinstance(t, torch.Tensor)]
            self.collectives.append((str(func), *carried))
        return func(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def fully_sharded(mesh):
    """5 rows are 3 and 2 on the ranks, 1 row is 1 and 0."""
    net = network()
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train(net, opt, steps, rank=None):
    """Mean squares over a batch for each of `steps`, or over a rank's half of it."""
    for k in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(k))
        x = x if rank is None else x.chunk(2)[rank]
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()


def whole(opt, net):
    """Full parameters and states, by name."""
    found = {}
    for name, p in net.named_parameters():
        for key, t in {"p": p, **opt.state[p]}.items():
            t = t.detach()
            found[name, key] = (t.full_tensor() if isinstance(t, DTensor) else t).tolist()
    return found
