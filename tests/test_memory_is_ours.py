"""What a step reads and writes is what the user's tensors are at that moment, wherever they lie by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import triton_optim as to
from triton_optim.dispatch import this_machine

pytestmark = pytest.mark.usefixtures("gradients_are")
COUNT = 7
STEPS = 5
DISTURBED = 3  # the step before which something happens
MIDDLE = 3


def made(device: torch.device) -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(4, 4, generator=random).to(device)) for _ in range(COUNT)]


def give_gradients(params: list[Parameter], step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=random).to(p.device, p.dtype)


def clone_data(state: dict[str, Any], name: str) -> None:
    state[name].data = state[name].data.clone()


def offload_and_back(state: dict[str, Any], name: str) -> None:
    away = state[name].data.clone()
    state[name].data = torch.empty(0, device=away.device)
    state[name].data = away


def set_storage(state: dict[str, Any], name: str) -> None:
    state[name].set_(state[name].clone())


def share(state: dict[str, Any], name: str) -> None:
    if state[name].device.type != "cpu":
        pytest.skip("shared memory of a GPU is another matter: CUDA tensors are shared as they are")
    state[name].share_memory_()


def turn(state: dict[str, Any], name: str) -> None:
    state[name].data = state[name].data.t()  # where it was, of the same shape


def move_in_front(state: dict[str, Any], name: str) -> None:
    larger = torch.cat((torch.zeros(1, 4, device=state[name].device), state[name].data))
    state[name].data = larger[1:]


def swap(state: dict[str, Any], name: str) -> None:
    torch.utils.swap_tensors(state[name], state[name].clone() * 2)


MOVES = [clone_data, offload_and_back, set_storage, share, turn, move_in_front, swap]
OPTIMIZERS = {
    "SGD": ({"lr": 0.1, "momentum": 0.5}, "momentum_buffer"),
    "AdamW": ({"lr": 0.1}, "exp_avg_sq"),
}


CASES = [("AdamW", move, "middle") for move in MOVES]
CASES += [("AdamW", clone_data, "all"), ("AdamW", offload_and_back, "all"), ("SGD", clone_data, "middle")]


@pytest.mark.parametrize(("kind", "move", "which"), CASES,
                         ids=[f"{kind} {move.__name__} {which}" for kind, move, which in CASES])  # fmt: skip
def test_a_state_that_moved_is_written_where_it_is(
    kind: str, move: Callable[..., None], which: str, backend: str, device: torch.device
) -> None:
    arguments, name = OPTIMIZERS[kind]
    ended = []
    for optimizers, options in ((torch.optim, {"foreach": False}), (to, {"backend": backend})):
        params = made(device)
        opt = getattr(optimizers, kind)(params, **arguments, **options)
        left: list[tuple[Tensor, Tensor]] = []
        for step in range(STEPS):
            give_gradients(params, step)
            if step == DISTURBED:
                for p in params if which == "all" else [params[MIDDLE]]:
                    before = opt.state[p][name].detach()
                    move(opt.state[p], name)
                    if before.data_ptr() != opt.state[p][name].data_ptr():
                        left.append((before, before.clone()))
            opt.step()
        for old, value in left:
            torch.testing.assert_close(old, value, rtol=0, atol=0)  # what was left is not written
        ended.append([t.detach() for p in params for t in (p, opt.state[p][name])])
    for theirs, ours in zip(*ended, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_state_that_stays_takes_no_new_plan(backend: str, device: torch.device) -> None:
    params = made(device)
    opt = to.AdamW(params, lr=0.1, backend=backend)
    plans = set()
    for step in range(STEPS):
        give_gradients(params, step)
        opt.step()
        plans.add(id(opt.engine.plan))
    assert len(plans) == 1


# Counts.


def one_back(opt: Any, params: list[Parameter]) -> None:
    opt.state[params[MIDDLE]]["step"] -= 1


def all_back(opt: Any, params: list[Parameter]) -> None:
    for s in opt.state.values():
        s["step"] -= 1


def one_anew(opt: Any, params: list[Parameter]) -> None:
    opt.state[params[0]]["step"].fill_(0)


def one_by_data(opt: Any, params: list[Parameter]) -> None:
    opt.state[params[MIDDLE]]["step"].data = torch.tensor(1.0, device=opt.state[params[MIDDLE]]["step"].device)


def by_numpy(opt: Any, params: list[Parameter]) -> None:
    opt.state[params[-1]]["step"].cpu().numpy()[...] += 4 if params[0].device.type == "cpu" else 0


def shared_count(opt: Any, params: list[Parameter]) -> None:
    opt.state[params[MIDDLE]]["step"].share_memory_()


@pytest.mark.parametrize("change", [one_back, all_back, one_anew, one_by_data, by_numpy, shared_count],
                         ids=lambda change: change.__name__)  # fmt: skip
@pytest.mark.parametrize("capturable", [False, True])
def test_a_count_is_its_parameters_alone(
    change: Callable[..., None], capturable: bool, backend: str, device: torch.device
) -> None:
    if capturable and change in (by_numpy, shared_count):
        pytest.skip("numpy writes behind torch's back, and a device's counts are in no shared memory")
    if capturable and backend != "triton" and device.type == "cpu":
        pytest.skip("where it is captured, only a GPU's backends run")
    ended = []
    for optimizers, options in (
        (torch.optim, {"foreach": False}),
        (to, {"backend": backend, "capturable": capturable}),
    ):
        params = made(device)
        opt = optimizers.AdamW(params, lr=0.1, **options)
        for step in range(STEPS):
            give_gradients(params, step)
            if step == DISTURBED:
                change(opt, params)
            opt.step()
        ended.append([t.detach().cpu() for p in params for t in (p, opt.state[p]["step"])])
    for theirs, ours in zip(*ended, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_count_is_written_in_place(backend: str, device: torch.device) -> None:
    params = made(device)
    opt = to.AdamW(params, lr=0.1, backend=backend)
    give_gradients(params, 0)
    opt.step()
    held = [opt.state[p]["step"] for p in params]
    for _ in range(3):
        opt.step()
    assert [t.item() for t in held] == [4] * COUNT
    assert all(opt.state[p]["step"] is t for p, t in zip(params, held, strict=True))


def test_a_count_that_a_user_gives_is_counted_on(backend: str, device: torch.device) -> None:
    params = made(device)
    opt = to.AdamW(params, lr=0.1, backend=backend)
    give_gradients(params, 0)
    opt.step()
    given = opt.state[params[MIDDLE]]["step"] = torch.tensor(5.0)
    for _ in range(2):
        opt.step()
    assert given.item() == 7
    assert [opt.state[p]["step"].item() for p in params] == [3] * MIDDLE + [7] + [3] * (COUNT - MIDDLE - 1)


# Memory that there is none.


def freed(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


FREED: dict[str, Callable[[Any, Parameter], Tensor]] = {
    "parameter": lambda opt, p: p.data,
    "gradient": lambda opt, p: p.grad,  # type: ignore[dict-item, return-value]
    "state": lambda opt, p: opt.state[p]["exp_avg"],
}


@pytest.mark.parametrize("what", FREED)
def test_memory_that_was_freed_is_refused(what: str, backend: str, device: torch.device) -> None:
    if backend == "eager":
        pytest.skip("its operations are torch's, which do not look")
    params = made(device)
    opt = to.AdamW(params, lr=0.1, backend=backend)
    for step in range(3):
        give_gradients(params, step)
        opt.step()
    give_gradients(params, 3)
    freed(FREED[what](opt, params[MIDDLE]))
    others = [p for p in params if p is not params[MIDDLE]]
    before = [p.detach().clone() for p in others]
    with pytest.raises(RuntimeError, match=f"parameter {MIDDLE}.* was freed: its storage has 0 bytes for 16 elements"):
        opt.step()
    assert all(map(torch.equal, others, before))


def test_a_state_elsewhere_is_refused(backend: str, device: torch.device) -> None:
    params = made(device)
    opt = to.AdamW(params, lr=0.1, backend=backend)
    give_gradients(params, 0)
    opt.step()
    opt.state[params[MIDDLE]]["exp_avg"] = opt.state[params[MIDDLE]]["exp_avg"].to("meta")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=f"exp_avg of parameter {MIDDLE} is on meta, the parameter on {device}"):
        opt.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize(
    "options", [{"state_dtype": "int8"}, {"state_dtype": "int4"}, {"param_precision": "master"},
                {"param_precision": "kahan"}, {"param_precision": "split24"}, {"param_precision": "split32"}],
    ids=lambda options: next(iter(options.values())))  # fmt: skip
def test_a_parameter_that_grew_is_refused(options: dict[str, Any], device: torch.device) -> None:
    """Its codes are not those of so many elements, nor are its corrections."""
    for backend in ("eager", "triton" if this_machine().triton else "cpp"):
        dtype = torch.float32 if "state_dtype" in options else torch.bfloat16
        p = Parameter(torch.ones(8192, dtype=dtype, device=device))
        opt = to.AdamW([p], lr=0.1, backend=backend, **options)
        p.grad = torch.ones_like(p)
        opt.step()
        p.data = torch.ones(16384, dtype=dtype, device=device)
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="of parameter 0 has"):
            opt.step()
        assert (p == 1).all()


# Memory that is shared, or may not be written.


def test_states_that_share_memory_are_updated_in_turn(device: torch.device) -> None:
    ended = []
    for kind, options in ((torch.optim.SGD, {"foreach": False}), (to.SGD, {"backend": "auto"})):
        params = made(device)
        opt: Any = kind(params, lr=0.1, momentum=0.5, **options)
        for step in range(STEPS):
            give_gradients(params, step)
            if step == 2:
                opt.state[params[1]]["momentum_buffer"].data = opt.state[params[4]]["momentum_buffer"].data
            if step == DISTURBED:
                opt.state[params[2]]["momentum_buffer"] = opt.state[params[5]]["momentum_buffer"]
            opt.step()
        ended.append([p.detach() for p in params])
    for theirs, ours in zip(*ended, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("options", "part", "dtype"),
    [({"param_precision": "master"}, "master", torch.float64),
     ({"param_precision": "kahan"}, "compensation", torch.float64),
     ({"param_precision": "split32"}, "residual_low", torch.int32),
     ({"state_dtype": "int8"}, "momentum_buffer_scale", torch.float64),
     ({"state_dtype": "int8"}, "momentum_buffer", torch.int32),
     ({"state_dtype": "int4"}, "momentum_buffer_scale", torch.float64)],
)  # fmt: skip
def test_a_part_of_another_dtype_is_refused(
    options: dict[str, Any], part: str, dtype: torch.dtype, device: torch.device
) -> None:
    for backend in ("eager", "triton" if this_machine().triton else "cpp"):
        p = Parameter(torch.ones(4096, dtype=torch.float32 if "state_dtype" in options else torch.bfloat16).to(device))
        opt = to.SGD([p], lr=0.1, momentum=0.5, backend=backend, **options)
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p][part] = opt.state[p][part].to(dtype)
        before = p.detach().clone()
        with pytest.raises(RuntimeError, match=f"{part.removesuffix('_scale')} of parameter 0 "):
            opt.step()
        assert torch.equal(p, before)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_codes_and_scales_with_gaps_between_them(state_dtype: str, backend: str, device: torch.device) -> None:
    """As loading code may leave them: what lies in the gaps is not written, and the step is that of others."""
    results = []
    for apart in (1, 2):
        p = Parameter(torch.linspace(-1, 1, 8192, device=device))
        optimizer = to.AdamW([p], lr=0.1, state_dtype=state_dtype, backend=backend)
        p.grad = torch.linspace(1, 2, 8192, device=device)
        optimizer.step()
        buffers = []
        for name, value in optimizer.state[p].items():
            if value.dim():
                buffers.append(torch.full((apart * value.numel(),), 7, dtype=value.dtype, device=device))
                optimizer.state[p][name] = buffers[-1][::apart].copy_(value)
        optimizer.step()
        assert apart == 1 or all(bool(buffer[1::2].eq(7).all()) for buffer in buffers)
        results.append(p.detach().clone())
    assert torch.equal(*results)
