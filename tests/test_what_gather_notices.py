"""Gathering of gradients: what a user did that must be noticed, and where nothing can be compiled."""

import gc
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from gathering import DISTURBED, SHAPES, STEPS, give_gradients, look_at_all, made, run, shift_gradient
from gathering import looks as looks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter

import triton_optim as to
from triton_optim.dispatch import this_machine
from triton_optim.util import cpp_build, gather

pytestmark = pytest.mark.skipif(not this_machine().cpp, reason="what gathers is built on Linux with a compiler")


def test_parameters_that_went_and_came_back_are_noticed(device):
    """The groups are again those that were noted; the last plan is another's."""
    results = []
    for changes in (True, False):
        params = made(device)
        opt = to.SGD(params, lr=0.1)
        for step in range(STEPS):
            give_gradients(params, step)
            opt.step()
            if step == DISTURBED:  # in a step of the others alone
                if changes:
                    last = opt.param_groups[0]["params"].pop()
                    give_gradients(params, step + STEPS)
                    opt.step()
                    opt.param_groups[0]["params"].append(last)
                else:
                    give_gradients(params, step + STEPS)
                    params[-1].grad = None
                    opt.step()
        results.append([p.detach() for p in params])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("between", ["push", "warmup", "a step that is refused"])
def test_numbers_that_were_read_and_taken_back_are_noticed(between, device):
    """The groups are again those that a step noted; what was read last is not."""
    params = made(device)
    opt = to.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.5)
    first, second = opt.param_groups
    give_gradients(params, 0)
    opt.step()
    kept = first["lr"], second["lr"]
    first["lr"] = 0.0
    if between == "push":
        opt.push_hyperparameters()
    elif between == "warmup":
        opt.warmup()
    else:
        second["lr"] = -1.0
        with pytest.raises(ValueError, match="learning rate"):
            opt.step()
    first["lr"], second["lr"] = kept
    expected = [p.detach() - 0.5 * p.grad for p in params]
    opt.step()
    assert all(map(torch.equal, params, expected))


def test_an_option_that_changed_before_a_step_that_failed_counts_in_the_next(device):
    """The groups are those that were read last, and the plan is of before."""
    results = []
    for package in (to, torch.optim):
        params = made(device)
        opt = package.Adam(params, lr=0.1, weight_decay=0.5)
        for step in range(STEPS):
            give_gradients(params, step)
            opt.step()
        opt.param_groups[0]["decoupled_weight_decay"] = True
        if package is to:
            params[0].grad = params[0].grad.to_sparse()
            with pytest.raises(RuntimeError, match="sparse"):
                opt.step()
        for step in range(STEPS, STEPS + 3):
            give_gradients(params, step)
            opt.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


def test_a_rule_that_an_attribute_chooses_is_noticed(device):
    """Nothing in the groups tells."""

    class Chosen(to.Adam):
        decoupled = False

        def variant(self, group):
            return self.variants[2 * self.decoupled]

        def scalars(self, group, step):
            return super().scalars(group | {"decoupled_weight_decay": self.decoupled}, step)

    results = []
    for kind, name in ((Chosen, "decoupled"), (torch.optim.Adam, None)):
        params = made(device)
        opt = kind(params, lr=0.1, weight_decay=0.5)
        for step in range(2 * STEPS):
            if step == STEPS:
                if name:
                    opt.decoupled = True
                else:
                    opt.param_groups[0]["decoupled_weight_decay"] = True
            give_gradients(params, step)
            opt.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


def test_a_number_that_scalars_changes_counts_in_the_next_step(device):
    class Halving(to.SGD):
        def scalars(self, group, step):
            h = super().scalars(group, step)
            self.param_groups[0]["lr"] *= 0.5
            return h

    p = Parameter(torch.zeros(1, device=device))
    opt = Halving([p], lr=1.0)
    for _ in range(4):
        rate, before, p.grad = opt.param_groups[0]["lr"], p.detach().clone(), torch.ones_like(p)
        opt.step()
        assert (before - p.detach()).item() == pytest.approx(rate)


def test_a_tensor_that_is_changed_in_place_is_read_in_every_step(device):
    params, rate = made(device), torch.tensor(0.0)
    opt = to.SGD(params, lr=rate)
    before = [p.detach().clone() for p in params]
    for step in range(STEPS):
        give_gradients(params, step)
        rate.fill_(0.5 * (step == DISTURBED))
        opt.step()
        assert all(map(torch.equal, params, before)) == (step < DISTURBED)


@pytest.mark.skipif(not this_machine().triton, reason="Triton is not installed")
def test_a_gradient_at_an_odd_address_is_looked_at(device, looks):
    """Accesses of 128 bits would miss it."""
    run(shift_gradient, "triton", device)
    assert looks == [True, False, True]


def test_a_frozen_parameter_that_gets_a_gradient_is_noticed(device):
    params = made(device)
    opt = to.AdamW(params, lr=0.1)
    for step in range(STEPS):
        give_gradients(params, step)
        if step < DISTURBED:
            params[2].grad = None
        before = params[2].detach().clone()
        opt.step()
        assert torch.equal(params[2], before) == (step < DISTURBED)
    assert opt.state[params[2]]["step"] == STEPS - DISTURBED


def test_gradients_that_come_and_go_take_no_look(device, looks, monkeypatch):
    """As in a mixture of experts."""
    results = []
    for _ in range(2):
        params = made(device)
        opt = to.AdamW(params, lr=0.1, max_grad_norm=0.5)
        for step in range(2 * STEPS):
            give_gradients(params, step)
            for i, p in enumerate(params):
                if step and (step + i) % 3 == 0:
                    p.grad = None
            versions = [p._version for p in params]
            opt.step()
            assert [p._version - v for p, v in zip(params, versions, strict=True)] == [
                p.grad is not None for p in params
            ]
        if not results:
            assert looks == [True]
            look_at_all(monkeypatch)
        results.append([t.detach() for p in params for t in (p, *opt.state[p].values())])
    assert all(map(torch.equal, *results))


def test_autograd_notices_the_writes(device):
    params = made(device)
    opt = to.AdamW(params, lr=0.1)
    for step in range(3):
        give_gradients(params, step)
        versions = [p._version for p in params]
        opt.step()
        assert [p._version for p in params] == [v + 1 for v in versions]


def test_parameters_are_not_kept_alive(device):
    params = made(device)
    opt = to.AdamW(params, lr=0.1)
    for step in range(3):
        give_gradients(params, step)
        opt.step()
    assert all(bucket._gatherer is not None for bucket in opt.engine.plan.buckets)
    gone = [weakref.ref(params[0]), weakref.ref(opt.engine.plan.buckets[0]._gatherer)]
    del params, opt
    gc.collect()
    assert [there() for there in gone] == [None, None]


@pytest.fixture
def mesh(device):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,))
    finally:
        torch.distributed.destroy_process_group()


def give_sharded(params, step, placements):
    random = torch.Generator().manual_seed(step)
    for p in params:
        own = torch.randn(p.shape, generator=random).to(p.device)
        p.grad = DTensor.from_local(own, p.device_mesh, placements, run_check=False)


@pytest.mark.parametrize("placements", [[Shard(0)], [Replicate()]], ids=str)
def test_sharded_gradients_are_gathered(placements, mesh, device, looks):
    """Each step's are new objects; of one kind of sharding, or of another."""
    steps = []
    for gathers in (True, False):
        values = [p.detach() for p in made(device) if p.dim()]
        params = [Parameter(DTensor.from_local(v.clone(), mesh, [Shard(0)], run_check=False)) for v in values]
        opt = to.AdamW(params, lr=0.1)
        with pytest.MonkeyPatch.context() as patch:
            if not gathers:
                look_at_all(patch)
            spec = params[0]._spec
            for step in range(STEPS):
                give_sharded(params, step, [Shard(0)] if step != DISTURBED else placements)
                for p in params:  # as FSDP does
                    if p.grad.placements == p.placements:
                        p.grad = DTensor(p.grad._local_tensor, p._spec, requires_grad=False)
                opt.step()
            assert params[0]._spec is spec
        steps.append([t.to_local() for p in params for t in (p.detach(), opt.state[p]["exp_avg"])])
        if gathers:
            assert looks == [True] if placements == [Shard(0)] else looks == [True, True]
    assert all(map(torch.equal, *steps))


def test_a_compiler_that_fails_is_not_in_the_way(device, monkeypatch):
    library = gather.Library()
    monkeypatch.setattr(gather, "flags", lambda: ("--no-such-option",))
    library.start_build()
    library._thread.join()
    assert library.loaded is None
    assert "no-such-option" in library.build_error
    monkeypatch.setattr("triton_optim.engine.plan.library", library)
    params = made(device)
    opt = to.AdamW(params, lr=0.1)
    for step in range(3):
        give_gradients(params, step)
        opt.step()
    assert opt.state[params[0]]["step"] == 3


def test_a_process_that_ends_meanwhile_leaves_nothing(tmp_path):
    """It is compiled beside the training. A run that is over sooner ends at once, and nothing half done is kept."""
    program = """
        import time
        from triton_optim.util import cpp_build, gather
        gather.library.start_build()
        while not cpp_build._running:
            time.sleep(0.001)
    """
    kept, temporary = tmp_path / "kept", tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, cpp_build.CACHE_VARIABLE: str(kept), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(kept.iterdir()) == []
    assert list(temporary.iterdir()) == []  # nor by the compiler itself


def test_few_parameters_are_gathered_where_others_had_it_compiled(device, looks, monkeypatch):
    monkeypatch.setattr("triton_optim.engine.plan.WORTHWHILE", len(SHAPES) + 1)
    params = made(device)
    opt = to.AdamW(params, lr=0.1)
    for step in range(3):
        give_gradients(params, step)
        opt.step()
    assert looks == [True]
