"""What others do to parameters of two processes: DDP, FSDP and ZeRO, release, offload, pages; ranks that disagree."""

import copy
import os
import re
from pathlib import Path

import pytest
import torch
from sharding import fully_sharded, local, network, sharded, train, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

import triton_optim as to

PAGES = Path(__file__).parents[1] / "docs" / "trainers"


def message_of(function):
    """What it raises."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return ""


def wrapped_by_others(mesh):
    """What is said where others average the gradients, or hand out parts of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of torch.jit

    x, said = torch.ones(2, 3), []
    net = DistributedDataParallel(network())
    opt = to.SGD(net.parameters(), lr=0.1)
    handle = to.enable_gradient_release(opt)
    said.append(message_of(lambda: net(x).sum().backward()))
    handle.remove()
    net.zero_grad()
    net(x).sum().backward()
    opt.step()  # as ever
    zero = ZeroRedundancyOptimizer(net.parameters(), to.AdamW, lr=0.1, max_grad_norm=1.0)
    said.append(message_of(zero.step))
    plain = to.AdamW(net.parameters(), lr=0.1, max_grad_norm=1.0)  # which sees all
    said.append(message_of(plain.step))
    for own in (True, False):
        flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=own)
        opt = to.AdamW(flat.parameters(), lr=0.1, max_grad_norm=1.0)
        flat(x).sum().backward()
        said.append(message_of(opt.step))
        opt.max_grad_norm = None
        said.append(message_of(opt.step))
        said += [message_of(kind(flat.parameters()).step) for kind in (to.LAMB, to.Adafactor)]
    zero = ZeroRedundancyOptimizer(net.parameters(), to.Prodigy, lr=1.0)
    return [*said, message_of(zero.step)]


def test_what_others_do_to_gradients_and_parameters_is_refused(ranks):
    for released, share, alone, *flat, of_model in ranks.run(wrapped_by_others):
        assert "are in DistributedDataParallel" in released
        assert "remove() the handle" in released
        assert "max_grad_norm=1.0" in share
        assert "ZeroRedundancyOptimizer" in share
        assert all("FullyShardedDataParallel" in limited for limited in flat[::4])
        assert [alone, *flat[1::4]] == ["", "", ""]
        assert ["looks at whole parameters" in parts for parts in flat] == [False, False, True, True] * 2
        assert "Prodigy sums over the whole model" in of_model


def offloaded(mesh, name):
    """Fully sharded, after 3 steps: where the parameters are, and on the host."""
    found = []
    for where in (None, "cpu"):
        net = fully_sharded(mesh)
        opt = getattr(to, name)(net.parameters(), lr=0.05, max_grad_norm=0.1, ema_decay=0.5, offload=where)
        train(net, opt, range(3), mesh.get_local_rank())
        opt.offload_states()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(net, opt, range(3, 5), mesh.get_local_rank())
        found.append(whole(opt, net))
    return found


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Adafactor"])
def test_sharded_parameters_are_stepped_on_the_host(name, ranks):
    for here, there in ranks.run(offloaded, name):
        assert there == here


def disagreeing(mesh):
    """What is said where two ranks would step the same parameters differently, in the first step and when resumed."""
    rank = mesh.get_local_rank()

    def stepped(apart=False, missing=(), **options):
        params = [Parameter(sharded(torch.ones(4, 2), mesh, [Shard(0)])) for _ in range(3)]
        cut = 1 + (apart and rank)
        groups = [{"params": params[:cut]}, {"params": params[cut:], "weight_decay": 0.5}]
        opt = to.AdamW(groups, **options)
        for i, p in enumerate(params):
            p.grad = None if i in missing else sharded(torch.ones(4, 2), mesh, [Shard(0)])
        said = message_of(opt.step)
        assert bool(said) == all(torch.equal(local(p), torch.ones(2, 2)) for p in params)
        return said

    said = [
        stepped(lr=0.1 + rank),
        stepped(max_grad_norm=None if rank else 1.0),
        stepped(state_dtype=torch.float32 if rank else None),
        stepped(missing=[2] * rank, max_grad_norm=1.0),
        stepped(apart=True),
    ]
    return said, [stepped(), stepped(missing=[1], max_grad_norm=1.0), stepped(lr=torch.tensor(0.1))]


def test_ranks_that_disagree_are_told_in_what(ranks):
    for said, agreeing in ranks.run(disagreeing):
        differences = [
            "lr of the group of parameter 0 is 0.1 on rank 0 and 1.1 on rank 1",
            "max_grad_norm is 1.0 on rank 0 and None on rank 1",
            "state_dtype of the group of parameter 0 is not there on rank 0 and torch.float32 on rank 1",
            "the gradient of parameter 2 is there on rank 0 and missing on rank 1",
            "the group of parameter 1 is 1 on rank 0 and 0 on rank 1",
        ]
        for message, difference in zip(said, differences, strict=True):
            assert f"AdamW: the ranks that share its parameters disagree: {difference}. Give all" in message
        assert agreeing == [""] * 3


def released(mesh, replicated):
    """Weights after steps of a trained twin, and with gradients that are released as each layer is reduced; whether
    there were any left after backward.
    """
    rank = mesh.get_local_rank()
    if replicated:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    nets = [fully_sharded(mesh) for _ in range(2)]
    optimizers = [to.AdamW(net.parameters(), lr=0.05, ema_decay=0.5, backend="eager") for net in nets]
    to.enable_gradient_release(optimizers[1])
    left = []
    for net, opt in zip(nets, optimizers, strict=True):
        step = opt.step

        def noted(net=net, step=step):
            left.append(sum(p.grad is not None for p in net.parameters()))
            step()

        opt.step = noted
        train(net, opt, range(4), rank)
        del opt.step
        opt.eval()
    weights = [[p.detach().full_tensor().tolist() for p in net.parameters()] for net in nets]
    return *weights, left, {p.to_local().numel() for p in nets[0].parameters()}


@pytest.mark.parametrize("replicated", [False, True], ids=["sharded", "copies"])
def test_gradients_are_released_once_they_are_reduced(replicated, ranks):
    """On a mesh whose last side is 1 as DistributedDataParallel trains, whose buckets keep all gradients."""
    answers = ranks.run(released, replicated)
    for kept, gone, left, sizes in answers:
        assert gone == kept == answers[0][0]
        assert left == [4] * 4 + [0] * 4
        assert (15 in sizes) == replicated


def page(mesh, name, folder):
    """Run the code of a page of docs/trainers, but for starting and ending the processes, which are here."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL))
    started = re.findall(r"^dist\.(?:init|destroy)_process_group\(.*\)$", code, re.MULTILINE)
    for call in started:
        code = code.replace(call, "pass")
    os.chdir(folder)
    os.environ["LOCAL_RANK"] = str(mesh.get_local_rank())
    found = {}
    exec(compile(code, f"{name}.md", "exec"), found)
    weights = [p.detach() for p in found["model"].parameters()]
    whole = [(p.full_tensor() if isinstance(p, DTensor) else p).tolist() for p in weights]
    return len(started), whole, found["optimizer"].engine.release is not None


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_pages_of_several_processes_run(name, ranks, tmp_path):
    answers = ranks.run(page, name, str(tmp_path))
    for started, weights, released in answers:
        assert (started, released) == (2, name == "ddp")
        assert weights == answers[0][1]
