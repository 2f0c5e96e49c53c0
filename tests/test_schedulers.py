"""Every scheduler of torch, driving ours and torch's optimizer side by side."""

import copy
import inspect
import pickle

import pytest
import torch
from conftest import BACKENDS
from side_by_side import assert_same, ours, peer, side_by_side, train, values
from table import CASES, KINDS, each_kind_and_backend, rows_and_backends
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from triton_optim.spec import Update


def moves_momentum(opt):
    """Whether OneCycleLR and CyclicLR can move a momentum along; without, they are told not to."""
    return "momentum" in opt.defaults or "betas" in opt.defaults


def cyclic(opt, *arguments, **options):
    return lr_scheduler.CyclicLR(opt, *arguments, **({"cycle_momentum": moves_momentum(opt)} | options))


def one_cycle(opt, **options):
    return lr_scheduler.OneCycleLR(opt, total_steps=14, cycle_momentum=moves_momentum(opt), **options)


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
    "CyclicLR": lambda o: cyclic(o, 1e-3, [0.1, 0.05], step_size_up=3, mode="triangular2"),
    "CyclicLR exp_range": lambda o: cyclic(o, 1e-3, 0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "CyclicLR lr alone": lambda o: cyclic(o, 1e-3, 0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: one_cycle(o, max_lr=[0.1, 0.02]),
    "OneCycleLR in three phases": lambda o: one_cycle(
        o, max_lr=0.1, three_phase=True, anneal_strategy="linear", base_momentum=0.5, max_momentum=0.9
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
STEPS = 12
# A scheduler's arithmetic is the same Python on both sides, and what it changes reaches the kernels by one path. So
# other backends than eager run the two that move most: lr from 0, and lr and betas or momentum together. All
# schedulers drive one optimizer of each kind once; what else is done with them is done with all of them for three.
MOVING = ("LambdaLR from zero", "OneCycleLR")


def driven(every):
    """Optimizers, schedulers and backends; with `every` all of these optimizers with all schedulers."""
    return {
        "argnames": ("case", "scheduler", "backend"),
        "argvalues": [
            pytest.param(case, scheduler, *backend.values, marks=backend.marks)
            for case in KINDS
            for scheduler in SCHEDULERS
            for backend in BACKENDS
            if (case.on_every_backend and scheduler in MOVING)
            or (backend.values[0] == "eager" and (every or case.on_every_backend or scheduler in MOVING))
        ],
    }


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}]


def advance(scheduler, step):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0 if step < 6 else 0.5)
    else:
        scheduler.step()


def scheduled(opt):
    """Everything that a scheduler may have changed, and exactly so."""
    keys = ("lr", "initial_lr", "momentum", "betas", "max_momentum", "base_momentum", "swa_lr", "max_lr", "min_lr")
    return [{key: group[key] for key in keys if key in group} for group in opt.param_groups]


def drive(case, pairs, scheduler, steps=STEPS, first=0, schedules=None):
    schedules = schedules or [SCHEDULERS[scheduler](opt) for _, opt in pairs]
    seen = []
    for step in range(first, first + steps):
        train(case, [step], *pairs)
        for schedule in schedules:
            advance(schedule, step)
        seen.append([copy.deepcopy(scheduled(opt)) for _, opt in pairs])
    return schedules, seen


def test_every_scheduler_of_torch_is_here():
    public = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert public - {"LRScheduler"} <= {name.split()[0] for name in SCHEDULERS}


@pytest.mark.parametrize(**driven(every=True))
def test_scheduler_drives_ours_as_it_drives_torchs(case, scheduler, backend, device):
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, groups(params), backend), peer(case, groups(theirs))
    _, seen = drive(case, [(params, opt), (theirs, torchs)], scheduler)
    assert all(mine == expected for mine, expected in seen)
    assert len({repr(mine) for mine, _ in seen}) > 1  # it did something
    if scheduler in ("OneCycleLR", "CyclicLR") and moves_momentum(opt):
        assert len({repr(mine[0].get("momentum", mine[0].get("betas"))) for mine, _ in seen}) > 1
    assert_same(case, opt, torchs)


@pytest.mark.parametrize(**driven(every=False))
def test_scheduler_writes_into_a_tensor_lr(case, scheduler, backend, device):
    """Schedulers fill a tensor lr in place, so a number read from it once goes stale."""
    lrs = [torch.tensor(0.01), torch.tensor(0.03)]
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, groups(params), backend), peer(case, groups(theirs))
    for group, their_group, lr in zip(opt.param_groups, torchs.param_groups, lrs, strict=True):
        group["lr"], their_group["lr"] = lr, lr.clone()
    _, seen = drive(case, [(params, opt), (theirs, torchs)], scheduler)
    assert all(mine == expected for mine, expected in seen)
    assert all(group["lr"] is lr for group, lr in zip(opt.param_groups, lrs, strict=True))
    assert_same(case, opt, torchs)


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [(c, s) for c in KINDS for s in SCHEDULERS if c.on_every_backend or s in MOVING],
    ids=lambda value: getattr(value, "name", value),
)
def test_scheduler_and_optimizer_resume_in_mid_schedule(case, scheduler, device):
    params, fresh = case.parameters(device), case.parameters(device)
    opt, other = ours(case, groups(params), "eager"), ours(case, groups(fresh), "eager")
    (schedule,), _ = drive(case, [(params, opt)], scheduler, steps=6)
    renewed = SCHEDULERS[scheduler](other)
    with torch.no_grad():
        for p, value in zip(fresh, values(params), strict=True):
            p.copy_(value)
    renewed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    _, seen = drive(case, [(params, opt), (fresh, other)], scheduler, steps=6, first=6, schedules=[schedule, renewed])
    assert all(mine == expected for expected, mine in seen)
    assert_same(case, other, opt, rtol=0, atol=0)


@each_kind_and_backend
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_optimizer_whose_step_a_scheduler_has_wrapped_can_be_copied(case, backend, duplicate, device):
    """A scheduler replaces `opt.step` by a wrapper on the instance, which must neither break a copy nor travel."""
    params = case.parameters(device)
    opt = ours(case, groups(params), backend)
    drive(case, [(params, opt)], "ExponentialLR", steps=2)
    twins, twin = duplicate((params, opt))
    drive(case, [(params, opt), (twins, twin)], "StepLR", steps=3, first=2)
    assert_same(case, twin, opt, rtol=0, atol=0)


# Not Rprop, of which lr is the first step size, whatever comes after; nor where a rate of 0 is refused.
@rows_and_backends(*(case for case in KINDS if case.still.keys() <= {"lr", "weight_decay"} and not case.still["lr"]))
def test_first_step_with_lr_of_zero_still_takes_the_gradient_in(case, backend, device):
    """A warm-up from zero is no probe of the states: its first gradient counts."""
    params, theirs = case.parameters(device), case.parameters(device)
    opt, torchs = ours(case, params, backend, lr=0.0), peer(case, theirs, lr=0.0)
    train(case, range(1), (params, opt), (theirs, torchs))
    for p, before in zip(params, case.parameters(device), strict=True):
        torch.testing.assert_close(p, before, rtol=0, atol=0)
    assert_same(case, opt, torchs)
    for group in opt.param_groups + torchs.param_groups:
        group["lr"] = 0.1
    train(case, range(1, 3), (params, opt), (theirs, torchs))
    assert_same(case, opt, torchs)


# Gradients that are all 0 tell those that sum over the model nothing: they may wait.
@rows_and_backends(*(case for case in CASES if "weight_decay" in case.settings and case.ours.total is Update.total))
def test_weight_decay_follows_the_scheduled_lr(case, backend, device):
    """Zero gradients, so that only the decay moves the parameters: lr * weight_decay is formed anew at each step."""
    params, opt, theirs, torchs = side_by_side(case, backend, device)
    schedules = [lr_scheduler.StepLR(o, step_size=1, gamma=0.5) for o in (opt, torchs)]
    for _ in range(3):
        for p in params + theirs:
            p.grad = torch.zeros_like(p)
        for optimizer, schedule in zip((opt, torchs), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert_same(case, opt, torchs)
    assert not torch.equal(params[0], case.parameters(device)[0])
    if opt.defaults.get("decoupled_weight_decay"):  # the product of the three factors
        for p, start in zip(params, case.parameters(device), strict=True):
            expected = start.double() * (1 - 0.01 * 0.1) * (1 - 0.005 * 0.1) * (1 - 0.0025 * 0.1)
            torch.testing.assert_close(p.double(), expected, rtol=1e-6, atol=0)


# torch.optim.swa_utils


def normalized(case, device):
    """A model with a batch normalization, and those of its parameters that the optimizer takes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).to(device)
    return model, [p for p in model.parameters() if not case.matrices or p.dim() == 2]


@each_kind_and_backend
@pytest.mark.parametrize("average", ["equal", "exponential"])
def test_averaged_model_swa_schedule_and_update_bn(case, backend, average, device):
    """Their average, their annealed rates and their renewed statistics, as with torch's optimizer."""
    multi_avg_fn = get_ema_multi_avg_fn(0.9) if average == "exponential" else None
    batches = [torch.linspace(-1, 1 + i, 24, device=device).reshape(8, 3) for i in range(3)]
    ends = []
    for make in (lambda params: ours(case, params, backend), lambda params: peer(case, params)):
        model, params = normalized(case, device)
        averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn)
        opt = make(params)
        schedule = SWALR(opt, swa_lr=0.03, anneal_epochs=2)
        for step in range(6):
            train(case, [step], (params, opt))
            if step >= 2:
                averaged.update_parameters(model)
                schedule.step()
        update_bn(batches, averaged, device)
        ends.append((averaged.state_dict(), opt.param_groups[0]["lr"], averaged(batches[0]).detach()))
    assert ends[0][1] == ends[1][1] == 0.03
    torch.testing.assert_close(ends[0], ends[1], **case.close)
