"""Every scheduler of torch, driving ours and torch's optimizer side by side."""

import copy
import inspect
import pickle

import pytest
import torch
from test_contract import CLOSE, PEERS, TRITON, assert_same, each_optimizer, leaves, ours, peer, train, values
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

# One line a case: enough of its options for each to change what it does to the groups within a dozen steps.
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (t + 1)]),
    "LambdaLR from zero": lambda o: lr_scheduler.LambdaLR(o, lambda t: t / 4),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, [0.1, 0.05], step_size_up=3, mode="triangular2"),
    "CyclicLR exp_range": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "CyclicLR lr alone": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.02], total_steps=14),
    "OneCycleLR in three phases": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=14, three_phase=True, anneal_strategy="linear", base_momentum=0.5, max_momentum=0.9
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3),
            lr_scheduler.CosineAnnealingLR(o, T_max=4),
            lr_scheduler.ExponentialLR(o, gamma=0.8),
        ],
        milestones=[3, 7],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.05, 0.03], anneal_epochs=5),
}
each_scheduler = pytest.mark.parametrize("scheduler", list(SCHEDULERS))
STEPS = 12
# A scheduler's arithmetic is the same Python on both sides, and what it changes reaches the kernels by one path. So
# the interpreter, which is slow, runs the two that move most: lr from 0, and lr and betas or momentum together.
MOVING = ("LambdaLR from zero", "OneCycleLR")
CASES = [(scheduler, pinned) for scheduler in SCHEDULERS for pinned in ("eager", "compiled")]
CASES += [pytest.param(scheduler, "triton", marks=TRITON) for scheduler in MOVING]
TENSOR_CASES = [(scheduler, "eager") for scheduler in SCHEDULERS] + [(scheduler, "compiled") for scheduler in MOVING]
TENSOR_CASES += [pytest.param(scheduler, "triton", marks=TRITON) for scheduler in MOVING]
TWO = ((4, 3), (5,))


def groups(params):
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]


def advance(scheduler, step):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0 if step < 6 else 0.5)
    else:
        scheduler.step()


def scheduled(opt):
    """Everything that a scheduler may have changed, and exactly so."""
    keys = ("lr", "initial_lr", "momentum", "betas", "max_momentum", "base_momentum", "swa_lr", "max_lr", "min_lr")
    return [{key: group[key] for key in keys if key in group} for group in opt.param_groups]


def drive(pairs, scheduler, steps=STEPS, first=0, schedules=None):
    schedules = schedules or [SCHEDULERS[scheduler](opt) for _, opt in pairs]
    seen = []
    for step in range(first, first + steps):
        train([step], *pairs)
        for schedule in schedules:
            advance(schedule, step)
        seen.append([copy.deepcopy(scheduled(opt)) for _, opt in pairs])
    return schedules, seen


def test_every_scheduler_of_torch_is_here():
    public = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert public - {"LRScheduler"} <= {name.split()[0] for name in SCHEDULERS}


@each_optimizer
@pytest.mark.parametrize(("scheduler", "pinned"), CASES)
def test_scheduler_drives_ours_as_it_drives_torchs(name, scheduler, pinned, device):
    params, theirs = leaves(device, shapes=TWO), leaves(device, shapes=TWO)
    opt, torchs = ours(name, groups(params), pinned), peer(name, groups(theirs))
    _, seen = drive([(params, opt), (theirs, torchs)], scheduler)
    assert all(mine == expected for mine, expected in seen)
    assert len({repr(mine) for mine, _ in seen}) > 1  # it did something
    assert_same(opt, torchs)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize(("scheduler", "pinned"), TENSOR_CASES)
def test_scheduler_writes_into_a_tensor_lr(name, scheduler, pinned, device):
    """Schedulers fill a tensor lr in place, so a number read from it once goes stale."""
    lrs = [torch.tensor(0.01), torch.tensor(0.03)]
    params, theirs = leaves(device, shapes=TWO), leaves(device, shapes=TWO)
    opt, torchs = ours(name, groups(params), pinned), peer(name, groups(theirs))
    for group, their_group, lr in zip(opt.param_groups, torchs.param_groups, lrs, strict=True):
        group["lr"], their_group["lr"] = lr, lr.clone()
    _, seen = drive([(params, opt), (theirs, torchs)], scheduler)
    assert all(mine == expected for mine, expected in seen)
    assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, lrs, strict=True))
    assert_same(opt, torchs)


@each_optimizer
@each_scheduler
def test_scheduler_and_optimizer_resume_in_mid_schedule(name, scheduler, device):
    params, fresh = leaves(device, shapes=TWO), leaves(device, shapes=TWO)
    opt, other = ours(name, groups(params), "eager"), ours(name, groups(fresh), "eager")
    (schedule,), _ = drive([(params, opt)], scheduler, steps=6)
    renewed = SCHEDULERS[scheduler](other)
    with torch.no_grad():
        for p, value in zip(fresh, values(params), strict=True):
            p.copy_(value)
    renewed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    _, seen = drive([(params, opt), (fresh, other)], scheduler, steps=6, first=6, schedules=[schedule, renewed])
    assert all(mine == expected for expected, mine in seen)
    assert_same(other, opt, rtol=0, atol=0)


@each_optimizer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_optimizer_whose_step_a_scheduler_has_wrapped_can_be_copied(name, backend, duplicate, device):
    """A scheduler replaces `opt.step` by a wrapper on the instance, which must neither break a copy nor travel."""
    params = leaves(device, shapes=TWO)
    opt = ours(name, groups(params), backend)
    drive([(params, opt)], "ExponentialLR", steps=2)
    twins, twin = duplicate((params, opt))
    drive([(params, opt), (twins, twin)], "StepLR", steps=3, first=2)
    assert_same(twin, opt, rtol=0, atol=0)


@each_optimizer
def test_first_step_with_lr_of_zero_still_takes_the_gradient_in(name, backend, device):
    """A warm-up from zero is no probe of the states (trap 23): its first gradient counts."""
    params, theirs = leaves(device, shapes=TWO), leaves(device, shapes=TWO)
    opt, torchs = ours(name, params, backend, lr=0.0), peer(name, theirs, lr=0.0)
    train(range(1), (params, opt), (theirs, torchs))
    for p, before in zip(params, leaves(device, shapes=TWO), strict=True):
        torch.testing.assert_close(p, before, rtol=0, atol=0)
    assert_same(opt, torchs)
    for group in opt.param_groups + torchs.param_groups:
        group["lr"] = 0.1
    train(range(1, 3), (params, opt), (theirs, torchs))
    assert_same(opt, torchs)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "SGD"])
def test_weight_decay_follows_the_scheduled_lr(name, backend, device):
    """Zero gradients, so that only the decay moves the parameters: lr * weight_decay is formed anew at each step."""
    params, theirs = leaves(device, shapes=TWO), leaves(device, shapes=TWO)
    opt, torchs = ours(name, params, backend), peer(name, theirs)
    schedules = [lr_scheduler.StepLR(o, step_size=1, gamma=0.5) for o in (opt, torchs)]
    for _ in range(3):
        for p in params + theirs:
            p.grad = torch.zeros_like(p)
        for optimizer, schedule in zip((opt, torchs), schedules, strict=True):
            optimizer.step()
            schedule.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, **CLOSE)
    if name != "Adam":  # decoupled: the product of the three factors
        for p, start in zip(params, leaves(device, shapes=TWO), strict=True):
            expected = start.double() * (1 - 0.01 * 0.1) * (1 - 0.005 * 0.1) * (1 - 0.0025 * 0.1)
            torch.testing.assert_close(p.double(), expected, rtol=1e-6, atol=0)
