"""Mixtures of experts and frozen layers: which parameters have a gradient differs from step to step.

A parameter without one keeps every bit of itself and of its state, and its step is not counted. Who is absent, and
where gradients lie, must not make the optimizer plan anew.
"""

import copy

import pytest
import torch
from conftest import TRITON
from launches import replace_launches
from one_step import step_with
from side_by_side import backward
from table import CASES, KINDS, OPTIONS_OF_KINDS, array, each_kind_and_backend, rows_and_backends
from torch.nn import Parameter

import triton_optim as to
from triton_optim.buckets.bucket import Bucket
from triton_optim.engine.plan import Plan

NEVER = 5  # the last of six parameters never gets a gradient
BY_NAME = {case.name: case for case in CASES}
# Those whose steps are planned; sparse rows are another way.
PLANNED = [case for case in KINDS if not case.sparse]


def presence(steps, slots, seed=0):
    """Who has a gradient: one at first, then any half of them, in one step nobody."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.rand(steps, slots, generator=random) < 0.5
    rows[0] = False
    rows[0, 0] = True
    rows[steps // 2] = False
    return rows.tolist()


def six(case, device):
    return [*case.parameters(device), *case.parameters(device, seed=1)[:2]]


def gradients_of(params, present, seed, case=BY_NAME["AdamW"]):
    random = torch.Generator().manual_seed(seed)
    values = [case.gradient(p, random) for p in params]
    return [g if there else None for g, there in zip(values, present, strict=True)]


def bits(opt, p):
    """The parameter and its states, to compare with later."""
    tensors = {"p": p, **{key: value for key, value in opt.state.get(p, {}).items() if value is not None}}
    return {key: torch.as_tensor(t).detach().clone() for key, t in tensors.items()}


@pytest.fixture
def plans(monkeypatch):
    """One entry for each plan that an optimizer made."""
    made, init = [], Plan.__init__

    def counted(self, *arguments, **more):
        made.append(self)
        init(self, *arguments, **more)

    monkeypatch.setattr(Plan, "__init__", counted)
    return made


@pytest.fixture
def formed(monkeypatch):
    """One entry for each row of scalars that was formed."""
    made, row = [], Bucket._row

    def counted(self, step_group):
        made.append(step_group)
        return row(self, step_group)

    monkeypatch.setattr(Bucket, "_row", counted)
    return made


@pytest.fixture
def no_launch(monkeypatch):
    """A program costs the interpreter 20 ms; where only the planning matters, none runs."""
    if to.dispatch.this_machine().triton:
        replace_launches(monkeypatch, lambda *_: None)


# Values.


@pytest.mark.parametrize(*OPTIONS_OF_KINDS)
def test_random_presence_is_the_references(case, options, backend, device):
    steps = 9
    params = six(case, device)
    starts = [array(p).copy() for p in params]
    opt = case.ours([{"params": params[:3]}, {"params": params[3:]}], **options, backend=backend)
    at_start = bits(opt, params[NEVER]).keys()
    given = []
    for k, present in enumerate(presence(steps, len(params))):
        present[NEVER] = False
        given.append(gradients_of(params, present, k, case))
        before = [bits(opt, p) for p in params]
        step_with(opt, params, given[-1])
        for i, p in enumerate(params):
            if not present[i]:
                after = bits(opt, p)
                assert after.keys() == before[i].keys(), f"step {k} made states for parameter {i}, which it skipped"
                assert all(torch.equal(after[key], before[i][key]) for key in after), f"step {k} changed parameter {i}"
    reference, states = case.reference(starts, [list(map(array, row)) for row in given], **options)
    for i, (p, value, state) in enumerate(zip(params, reference, states, strict=True)):
        # float32: eight roundings a step at values of order 1.
        tolerance = {"rtol": steps * 8 * 2**-23, "atol": steps * 8 * 2**-23}
        torch.testing.assert_close(p.detach().cpu().double(), torch.as_tensor(value), **tolerance)
        for key, expected in state.items():
            exactly = {"rtol": 0, "atol": 0} if key == "step" else tolerance
            actual = torch.as_tensor(opt.state[p][key]).cpu().double()
            torch.testing.assert_close(
                actual, torch.as_tensor(expected).double(), **exactly, msg=lambda m, i=i, k=key: f"{k} of {i}: {m}"
            )
    assert bits(opt, params[NEVER]).keys() == at_start, "a state without a gradient"


@rows_and_backends(*(case for case in KINDS if case.torchs))
def test_mixture_of_experts_trains_as_with_torch(case, backend, device):
    """Top-1 routing by chance; ``zero_grad`` to None, and for some steps to zero, which counts as a gradient."""

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            bias = not case.matrices
            self.inside, self.out = torch.nn.Linear(3, 4, bias), torch.nn.Linear(4, 1, bias)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias) for _ in range(3))

        def forward(self, x, expert):
            return self.out(torch.tanh(self.experts[expert](self.inside(x))))

    ours = Mixture().to(device)
    theirs = copy.deepcopy(ours)
    opt = case.ours(ours.parameters(), lr=0.05, backend=backend)
    their_opt = case.torchs(theirs.parameters(), lr=0.05)
    random = torch.Generator().manual_seed(1)
    for k in range(8):
        expert = int(torch.randint(3, (), generator=random))
        x = torch.randn(6, 3, generator=random).to(device)
        for net, each in ((ours, opt), (theirs, their_opt)):
            each.zero_grad(set_to_none=k < 6)
            backward(case, net(x, expert).square().mean(), net.parameters())
            each.step()
        for (label, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            # Gradients come from the parameters of the step before, so rounding is passed on and on.
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, label=label: f"{label}: {m}")
            assert opt.state[p].get("step") == their_opt.state[q].get("step") if q in their_opt.state else True


def test_a_whole_bucket_misses_a_step(backend, device):
    """Two dtypes are two buckets, and in turn neither member of one has a gradient."""
    dtypes = [torch.float32, torch.float32, torch.float64, torch.float64]
    params = [Parameter(torch.randn(3, dtype=dtype).to(device)) for dtype in dtypes]
    starts = [p.detach().cpu().double().numpy().copy() for p in params]
    opt = to.AdamW(params, backend=backend)
    patterns = [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]]
    given = [gradients_of(params, present, k) for k, present in enumerate(patterns)]
    for row in given:
        step_with(opt, params, row)
    values, _ = BY_NAME["AdamW"].reference(
        starts, [[None if g is None else g.cpu().double().numpy() for g in row] for row in given]
    )
    for p, value in zip(params, values, strict=True):
        eps = 8 * len(given) * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.detach().cpu().double(), torch.as_tensor(value), rtol=eps, atol=eps)
    assert [opt.state[p]["step"].item() for p in params] == [3, 4, 3, 3]


def test_skipped_parameter_can_still_be_backed_through(backend, device):
    """A graph that saved it is still valid, as with torch.optim: nothing was written."""
    used, skipped = (Parameter(torch.ones(3, device=device)) for _ in range(2))
    opt = to.AdamW([used, skipped], backend=backend)
    step_with(opt, [used, skipped], [torch.ones_like(used), torch.ones_like(skipped)])
    loss = (skipped * skipped).sum()
    step_with(opt, [used, skipped], [torch.ones_like(used), None])
    loss.backward()
    assert torch.equal(skipped.grad, 2 * skipped)


@each_kind_and_backend
def test_newcomer_starts_with_its_own_first_step(case, backend, device):
    """Long after the others have begun, it moves as the only parameter of a fresh optimizer would."""
    options = {"momentum": 0.9, "dampening": 0.5} if case.name == "SGD" else {}
    old, new, alone = (Parameter(torch.full((2, 3), float(i), device=device)) for i in (0, 1, 1))
    opt = case.ours([old, new], lr=0.1, **options, backend=backend)
    for k in range(4):
        step_with(opt, [old, new], gradients_of([old, new], [True, k == 3], k, case))
    fresh = case.ours([alone], lr=0.1, **options, backend=backend)
    step_with(fresh, [alone], [new.grad])
    torch.testing.assert_close(new, alone, rtol=1e-6, atol=0)  # on a CPU equal; GPUs may contract
    for key, value in fresh.state[alone].items():
        torch.testing.assert_close(opt.state[new][key], value, rtol=1e-6, atol=0)


def test_step_counts_are_exact_after_many_steps(backend, device, no_launch):
    slots, steps = 12, 60
    params = [Parameter(torch.zeros(2, device=device)) for _ in range(slots)]
    opt = to.AdamW(params, backend=backend)
    patterns = presence(steps, slots)
    for k, present in enumerate(patterns):
        step_with(opt, params, gradients_of(params, present, k))
        if k in (7, 30):  # a checkpoint in between
            opt.load_state_dict(opt.state_dict())
    expected = [sum(column) for column in zip(*patterns, strict=True)]
    assert [opt.state[p]["step"].item() for p in params] == expected
    saved = opt.state_dict()["state"]
    assert [saved[i]["step"].item() for i in range(slots)] == expected


# Planning.


@rows_and_backends(*PLANNED)
def test_rows_of_scalars_do_not_multiply(case, backend, device, formed, no_launch):
    """At most two for each number of steps that parameters have made; where steps are not counted, two a group."""
    slots, steps = 32, 30
    params = [Parameter(torch.zeros(2, 2, device=device)) for _ in range(slots)]
    opt = case.ours([{"params": params[:20]}, {"params": params[20:]}], backend=backend)
    patterns = presence(steps, slots)
    counts = torch.zeros(slots)
    for k, present in enumerate(patterns):
        group = torch.arange(slots) >= 20
        made = counts if case.ours.counts_steps else counts.clamp(max=1)
        distinct = len(set(zip(group.tolist(), made.tolist(), strict=True)))
        formed.clear()
        step_with(opt, params, gradients_of(params, present, k, case))
        assert len(formed) <= 2 * distinct, f"step {k}"
        counts += torch.tensor(present)


def newcomers(patterns):
    """In how many steps some parameter gets its first gradient."""
    seen, steps = set(), 0
    for present in patterns:
        own = {i for i, there in enumerate(present) if there}
        steps += not own <= seen
        seen |= own
    return steps


@pytest.mark.parametrize(*OPTIONS_OF_KINDS)
def test_gradients_that_move_or_miss_a_step_plan_nothing_anew(case, options, backend, device, plans, no_launch):
    params = six(case, device)
    opt = case.ours(params, **options, backend=backend)
    patterns = [[True] * 6, [True] * 6, *presence(10, 6)]
    held = []  # so that no gradient gets the address of an earlier one
    for k, present in enumerate(patterns):
        for group in opt.param_groups:
            group["lr"] = 1e-3 / (k + 1)
            if group.get("weight_decay"):
                group["weight_decay"] = 0.1 / (k + 1)
        held.append(gradients_of(params, present, k, case))
        step_with(opt, params, held[-1])
    assert len(plans) == 1


@pytest.mark.parametrize(*OPTIONS_OF_KINDS)
def test_plans_are_made_for_newcomers_alone(case, options, backend, device, plans, no_launch):
    """Also where no state would tell that a parameter has been here before (SGD without momentum)."""
    params = six(case, device)
    opt = case.ours(params, **options, backend=backend)
    patterns = presence(20, 6)
    for k, present in enumerate(patterns):
        step_with(opt, params, gradients_of(params, present, k, case))
    assert len(plans) <= newcomers(patterns)


def test_two_experts_in_turn_plan_twice(backend, device, plans, no_launch):
    for cls in (to.AdamW, to.SGD):
        plans.clear()
        params = [Parameter(torch.zeros(3, device=device)) for _ in range(2)]
        opt = cls(params, backend=backend)
        for k in range(12):
            step_with(opt, params, gradients_of(params, [k % 2 == 0, k % 2 == 1], k))
        assert len(plans) <= 2, cls.__name__


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
def test_absent_gradients_of_another_dtype_are_remembered(backend, device, plans, no_launch):
    """Planned for while absent as if it were of the parameter's dtype, each would come back to a wrong bucket."""
    params = [Parameter(torch.zeros(3, dtype=torch.bfloat16, device=device)) for _ in range(4)]
    opt = to.AdamW(params, backend=backend)
    patterns = presence(24, 4)
    for k, present in enumerate(patterns):
        step_with(opt, params, [g if g is None else g.float() for g in gradients_of(params, present, k)])
    assert len(plans) <= newcomers(patterns)


def test_absent_misaligned_gradients_are_remembered(device, plans, no_launch):
    params = [Parameter(torch.zeros(3, device=device)) for _ in range(4)]
    opt = to.AdamW(params, backend="triton")
    patterns = presence(24, 4)
    for k, present in enumerate(patterns):
        gradients = gradients_of(params, present, k)
        step_with(opt, params, [g if g is None else torch.cat((g[:1], g))[1:] for g in gradients])
    assert len(plans) <= newcomers(patterns)


def test_a_bucket_that_sits_out_the_first_step_of_a_plan_keeps_its_rates(backend: str, device: torch.device) -> None:
    """Two dtypes are two buckets; after loading, the second has no gradient in the first step, then two rates."""
    first = torch.nn.Parameter(torch.zeros(2, device=device))
    others = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64, device=device)) for _ in range(2)]
    groups = [{"params": [first]}, {"params": [others[0]], "lr": 0.5}, {"params": [others[1]], "lr": 0.25}]
    source = to.SGD(groups, lr=1.0, momentum=0.5, backend="eager")
    for p in (first, *others):
        p.grad = torch.ones_like(p)
    source.step()
    optimizer = to.SGD(groups, lr=1.0, momentum=0.5, backend=backend)
    optimizer.load_state_dict(source.state_dict())
    for p in others:
        p.grad = None
    optimizer.step()
    for p in others:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert [p[0].item() for p in others] == [-0.5 - 0.5 * 0.5, -0.25 - 0.25 * 0.5]


def test_counts_that_are_moved_go_on_where_they_lie(backend, device):
    """Shared memory is another: three step groups. Nothing but their counts tells that the middle one moved."""
    params = [Parameter(torch.ones(3, device=device)) for _ in range(3)]
    opt = to.AdamW([{"params": [p]} for p in params], backend=backend)
    for k in range(4):
        step_with(opt, params, [torch.ones_like(p) for p in params])
        if k == 1:
            opt.state[params[1]]["step"].share_memory_()
            old = torch.full((1 << 10,), -1.0)  # whoever wrote to the old memory might write here
    assert [opt.state[p]["step"].item() for p in params] == [4, 4, 4]
    assert (old == -1).all()


@pytest.mark.parametrize("capturable", [False, True])
def test_counts_lie_where_they_did(capturable, backend, device):
    """However often the parameters are sorted anew by their counts; and each is that of torch's for-loop."""
    if capturable and backend == "cpp":
        pytest.skip("captured steps run on devices")
    case = BY_NAME["AdamW"]
    params, others = six(case, device), six(case, device)
    opt, theirs = to.AdamW(params, backend=backend, capturable=capturable), torch.optim.AdamW(others, foreach=False)
    rows = [[True] * len(params), *presence(12, len(params))]
    for number, present in enumerate(rows):
        gradients = gradients_of(params, present, number)
        step_with(opt, params, gradients)
        step_with(theirs, others, gradients)
        counts = [opt.state[p]["step"] for p in params]
        if number == 0:
            first = counts
        assert capturable or all(a is b for a, b in zip(counts, first, strict=True))
        assert [int(t) for t in counts] == [int(theirs.state[p]["step"]) for p in others]
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_a_count_that_is_written_between_differing_ones_is_noticed(backend, device):
    case = BY_NAME["AdamW"]
    params, others = six(case, device), six(case, device)
    sides = [(params, to.AdamW(params, backend=backend)), (others, torch.optim.AdamW(others, foreach=False))]
    for own, opt in sides:
        for number, present in enumerate([[True] * len(own), *presence(8, len(own))]):
            if number == 6:
                opt.state[own[2]]["step"].fill_(40)
            step_with(opt, own, gradients_of(own, present, number))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
    assert [int(sides[0][1].state[p]["step"]) for p in params] == [int(sides[1][1].state[p]["step"]) for p in others]


@TRITON
def test_rows_are_placed_where_they_were(device):
    """However many there are: a table of another size would be pinned anew."""
    params, tables = six(BY_NAME["AdamW"], device), set()
    opt = to.AdamW(params, backend="triton")
    for number, present in enumerate([[True] * len(params), *presence(12, len(params))]):
        step_with(opt, params, gradients_of(params, present, number))
        tables |= {id(t) for b in opt.engine.plan.buckets if (t := getattr(b, "_row_table", None)) is not None}
    assert len(tables) == 1
