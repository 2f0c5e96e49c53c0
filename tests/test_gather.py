"""Gradients gathered in C++: whatever happens to parameters and gradients between steps is noticed, and what is usual
takes no look of Python's.
"""

import gc
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter

import triton_optim as to
from triton_optim.dispatch import this_machine
from triton_optim.engine.plan import Plan
from triton_optim.util import cpp_build, gather

pytestmark = pytest.mark.skipif(not this_machine().cpp, reason="what gathers is built on Linux with a compiler")
SHAPES = [(3, 2, 1, 1), (4, 2, 3, 3), (7,), (), (5, 2), (3, 3)]
STEPS = 6
DISTURBED = 3  # the step before which something happens


def made(device):
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=random).to(device)) for shape in SHAPES]


def give_gradients(params, step):
    random = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(p.device, getattr(p, "grad_dtype", None) or p.dtype)


@pytest.fixture
def looks(monkeypatch):
    """The steps for which Python looked at the gradients: True where they could be used."""
    found, bind = [], Plan.bind
    monkeypatch.setattr(Plan, "bind", lambda self, g: found.append(bind(self, g)) or found[-1])
    return found


def test_it_is_compiled_here():
    """Where it is not, Python looks at all gradients, and only this test tells."""
    assert gather.library.loaded is not None, gather.library.build_error


def move(opt, params):
    params[1].data = params[1].data.clone()


def reshape(opt, params):
    params[4].data = params[4].data.view(2, 5)  # where it was
    params[4].grad = params[4].grad.view(2, 5)


def shrink(opt, params):
    params[2].whole = params[2].data
    params[2].data = params[2].data[:5]  # where it was, with the stride it had
    params[2].grad = params[2].grad[:5]


def turn(opt, params):
    params[5].data = params[5].data.t()  # where it was, of the same shape
    params[5].grad = params[5].grad.t()


def restride(opt, params):
    params[1].data = params[1].data.to(memory_format=torch.channels_last)


def widen(opt, params):
    for p in params:
        p.data = p.data.double()
        p.grad = p.grad.double()


def swap(opt, params):
    # What autograd holds of a parameter, and its gradient, would be swapped too.
    grad, params[2].grad = params[2].grad, None
    torch.utils.swap_tensors(params[2], Parameter(params[2].detach() * 2))
    params[2].grad = grad


def replace(opt, params):
    new = Parameter(params[2].detach() + 1)
    new.grad = params[2].grad
    params[2] = opt.param_groups[0]["params"][2] = new


def skip(opt, params):
    params[0].grad = None


def skip_all(opt, params):
    for p in params:
        p.grad = None


def transpose(opt, params):
    params[4].grad = params[4].grad.t().contiguous().t()


def cut(opt, params):
    params[2].grad.data = params[2].grad.data[:5]


def negate(opt, params):
    params[2].grad = torch._neg_view(params[2].grad)
    assert params[2].grad.is_neg()


def negate_strided(opt, params):
    params[4].grad = torch.complex(torch.zeros_like(params[4]), params[4].grad).conj().imag
    assert params[4].grad.is_neg()


def narrow(opt, params):
    for p in params:
        g, p.grad = p.grad, None
        p.grad_dtype = torch.bfloat16
        p.grad = g.bfloat16()


def make_sparse(opt, params):
    params[4].grad = params[4].grad.to_sparse()


def expand(opt, params):
    params[4].grad = torch.ones((), device=params[4].device).expand(5, 2)


def load_states(opt, params):
    opt.load_state_dict(opt.state_dict())


def replace_state(opt, params):
    opt.state[params[1]]["exp_avg"] = torch.ones_like(params[1])


def add_group(opt, params):
    params.append(Parameter(torch.ones(3, device=params[0].device)))
    params[-1].grad = torch.ones_like(params[-1])
    opt.add_param_group({"params": [params[-1]], "lr": 0.5})


def shift_gradient(opt, params):
    params[2].grad = torch.cat((params[2].grad[:1], params[2].grad))[1:]  # at no multiple of 16


def change_rate(opt, params):
    opt.param_groups[0]["lr"] = 0.5


def change_betas(opt, params):
    opt.param_groups[0]["betas"] = (0.5, 0.6)


def rate_in_a_tensor(opt, params):
    opt.param_groups[0]["lr"] = torch.tensor(0.5)


def maximize(opt, params):
    opt.param_groups[0]["maximize"] = True


def limit(opt, params):
    opt.max_grad_norm = 0.01


def reverse(opt, params):
    opt.param_groups[0]["params"].reverse()


def drop(opt, params):
    opt.param_groups[0]["params"].pop(1)


def trade_names(opt, params):
    group = opt.param_groups[0]
    group["lr"], group["eps"] = group["eps"], group["lr"]


def other_order(opt, params):
    """The same values, of which the rate has come last."""
    group = opt.param_groups[0]
    group["lr"] = group.pop("lr")


def share_parameter(opt, params):
    params[0].data.share_memory_()  # other memory for the same storage


def share_states(opt, params):
    for value in opt.state[params[0]].values():
        if value.dim():
            value.share_memory_()


DISTURBANCES = [share_parameter, share_states, move, reshape, shrink, turn, restride, widen, swap, replace, skip,
                skip_all, transpose, cut, negate, negate_strided, narrow, make_sparse, expand, load_states,
                replace_state, add_group, shift_gradient, change_rate, change_betas, rate_in_a_tensor, maximize, limit,
                reverse, drop, trade_names, other_order]  # fmt: skip


def run(disturb, backend, device, mark=lambda: None):
    params = made(device)
    # A state keeps its shape, and would not be that of a parameter that is reshaped; without one, none tells of others.
    kind = to.SGD if disturb in (reshape, shrink, replace) else to.AdamW
    opt = kind(params, lr=0.1, backend=backend)
    for step in range(STEPS):
        give_gradients(params, step)
        if step == DISTURBED:
            mark()
            try:
                disturb(opt, params)
            except RuntimeError as error:
                pytest.skip(f"torch does not do it: {error}")
        try:
            opt.step()
        except RuntimeError as error:  # of a kind that is refused
            return [str(error), *(p.detach() for p in params)]
    return [t.detach() for p in params for t in (p, getattr(p, "whole", p), *opt.state.get(p, {}).values())]


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda d: d.__name__)
def test_what_happens_between_steps_is_noticed(disturb, backend, device, looks, monkeypatch):
    if backend == "cpp" and device.type != "cpu":
        pytest.skip("the C++ backend needs CPU tensors; a GPU is tested here")
    before = []
    gathered = run(disturb, backend, device, mark=lambda: before.append(list(looks)))
    # Python has looked at the first step's, to plan it, and at none after it.
    assert before == [[True]]
    monkeypatch.setattr(gather.library, "loaded", None)
    looked_at = run(disturb, backend, device)
    assert len(gathered) == len(looked_at)
    for ours, theirs in zip(gathered, looked_at, strict=True):
        assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)


@pytest.mark.parametrize("disturb", [None, change_rate], ids=["nothing", "rate"])
def test_usual_steps_take_no_look(disturb, device, looks):
    run(disturb or (lambda opt, params: None), "auto", device)
    assert looks == [True]


def test_what_is_on_disk_is_there_from_the_first_step_on(monkeypatch):
    found = gather.Library()
    found.load_built()
    assert found.loaded is not None
    monkeypatch.setattr(gather, "flags", lambda: ("--of-another-compiler",))
    other = gather.Library()
    other.load_built()
    assert other.loaded is None
    assert other.build_error is None  # nothing was tried


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
            monkeypatch.setattr(gather.library, "loaded", None)
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
                patch.setattr(gather.library, "loaded", None)
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
