"""Checkpoints of bitsandbytes, torchao, optimi and flashoptim, made here as they make them: converted, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from complaints import Unchanged, explains
from torch import Tensor
from torch.nn import Parameter

import triton_optim as to
from triton_optim.core.convert import master

SHAPES = ((5, 60), (7,))  # for blocks of 256: one full and one that is not; and too small for codes
BETAS = (0.8, 0.95)
NAMES = {
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "Lion": ("exp_avg",),
    "SGD": ("momentum_buffer",),
    "RMSprop": ("square_avg",),
    "Adagrad": ("sum",),
}
UNSIGNED = ("exp_avg_sq", "square_avg", "sum")
STEP = 3


class Coded(Tensor):
    """A tensor that has no memory of its own and knows how it is decoded, as torchao's states."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls: Any, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], []

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, attributes: Any, size: Any = None, stride: Any = None) -> Any:
        return cls(*parts.values())

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.codes.double() * self.scale

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of {cls.__name__}")


def parameters() -> list[Parameter]:
    random = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


def moments(kind: str) -> list[dict[str, Tensor]]:
    """A state for each parameter, as torch.optim's has it."""
    random = torch.Generator().manual_seed(1)
    states = [{name: torch.randn(shape, generator=random) for name in NAMES[kind]} for shape in SHAPES]
    return [{n: v.square() if n in UNSIGNED else v for n, v in state.items()} for state in states]


def groups(**own: Any) -> list[dict[str, Any]]:
    return [{"lr": 0.01, "weight_decay": 0.0, **own, "params": [0, 1]}]


def quantized(value: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what they stand for: the nearest of a table's values, times the largest of the block."""
    padded = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % block)).view(-1, block)
    scales = padded.abs().amax(1)
    codes = ((padded / scales[:, None])[..., None] - table).abs().argmin(-1)
    decoded = (table[codes] * scales[:, None]).flatten()[: value.numel()].view(value.shape)
    return codes.flatten()[: value.numel()].view(value.shape).to(torch.uint8), scales, decoded


def bitsandbytes(kind: str, bits: int = 8, wrapped: bool = True) -> tuple[Any, list[dict[str, Tensor]]]:
    """Its state dict, and the states that it stands for."""
    states, expected = {}, moments(kind)
    for i, state in enumerate(expected):
        parts: dict[str, Any] = {}
        for number, (name, value) in enumerate(list(state.items()), 1):
            parts[f"state{number}"] = value
            if bits == 8 and i == 0:
                table = torch.linspace(0 if name in UNSIGNED else -1, 1, 256) ** 3
                parts[f"qmap{number}"] = table
                parts[f"state{number}"], parts[f"absmax{number}"], state[name] = quantized(value, table, 256)
        states[i] = {"step": STEP, **({"__bnb_optimizer_quant_state__": parts} if wrapped else parts)}
    betas = {"SGD": (0.9, 0), "RMSprop": (0.95, 0), "Adagrad": (0.0, 0.0)}.get(kind, BETAS)
    return {
        "state": states,
        "param_groups": groups(betas=betas, eps=1e-8, alpha=0.0, t_alpha=None, t_beta3=None),
    }, expected


def torchao(kind: str) -> tuple[Any, list[dict[str, Tensor]]]:
    expected = moments(kind)
    states: dict[int, Any] = {1: {"step": torch.tensor(3.0), **{n: v.clone() for n, v in expected[1].items()}}}
    states[0] = {"step": torch.tensor(3.0)}
    for name, value in expected[0].items():
        codes = (value * 20).round().to(torch.int8)
        states[0][name], expected[0][name] = Coded(codes, torch.tensor(0.05)), codes.float() * 0.05
    return {
        "state": states,
        "param_groups": groups(lr=torch.tensor(0.01), betas=BETAS, eps=1e-8, amsgrad=False),
    }, expected


def optimi(kind: str) -> tuple[Any, list[dict[str, Tensor]]]:
    expected, states = moments(kind), {}
    for i, state in enumerate(expected):
        corrections = (1 - BETAS[0] ** STEP, 1 - BETAS[1] ** STEP) if len(state) == 2 else (1.0,)
        values = [value / by for value, by in zip(state.values(), corrections, strict=True)]
        states[i] = {**dict(zip(("exp_avg", "exp_avg_sq"), values, strict=False)), "kahan_comp": None}
    own = {"momentum": 0.9, "dampening": True} if kind == "SGD" else {"beta1": BETAS[0], "beta2": BETAS[1], "eps": 1e-8}
    own |= {"step": torch.tensor(STEP, dtype=torch.int32)} if len(NAMES[kind]) == 2 else {}
    own |= {"decouple_wd": kind == "AdamW", "decouple_lr": False, "max_lr": None, "kahan_sum": None, "triton": False}
    return {"state": states, "param_groups": groups(**own)}, expected


def flashoptim(kind: str, compressed: bool = True) -> tuple[Any, list[dict[str, Tensor]]]:
    expected, states = moments(kind), {}
    for i, state in enumerate(expected):
        states[i] = {"step": torch.tensor(STEP)} if len(state) == 2 else {}
        for name, value in list(state.items()):
            if not compressed:
                states[i][name] = value.clone()
                continue
            second = name in UNSIGNED
            wanted = value.sqrt() if second else value
            padded = torch.nn.functional.pad(wanted.flatten(), (0, -value.numel() % 32)).view(-1, 32)
            scales = padded.abs().amax(1).half()
            part = padded / scales.float()[:, None]
            part = part if second else 2 * part / (1 + part.abs())
            codes = (part * (255 if second else 127)).round()
            found = codes / (255 if second else 127)
            found = found if second else found / (2 - found.abs())
            found = (found * scales.float()[:, None]).flatten()[: value.numel()].view(value.shape)
            state[name] = found.square() if second else found
            kept = codes.flatten()[: value.numel()].view(value.shape).to(torch.uint8 if second else torch.int8)
            states[i] |= {f"{name}::quantized": kept, f"{name}::scales": scales.view(torch.bfloat16) if i else scales}
    own = {"momentum": 0.9, "dampening": 0.0} if kind == "SGD" else {"betas": BETAS, "eps": 1e-8}
    return {
        "state": states,
        "param_groups": groups(initial_lr=0.01, master_bytewidth=3, quantize=True, **own),
    }, expected


SAVED = {
    **{f"bitsandbytes {kind}": (bitsandbytes, kind) for kind in ("Adam", "AdamW", "Lion", "SGD", "RMSprop", "Adagrad")},
    **{f"torchao {kind}": (torchao, kind) for kind in ("Adam", "AdamW")},
    **{f"optimi {kind}": (optimi, kind) for kind in ("Adam", "AdamW", "RAdam", "Lion", "SGD")},
    **{f"flashoptim {kind}": (flashoptim, kind) for kind in ("Adam", "AdamW", "Lion", "SGD")},
}


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SAVED)
def test_training_goes_on_from_a_converted_checkpoint(name: str, state_dtype: Any) -> None:
    make, kind = SAVED[name]
    saved, expected = make(kind)
    before = copy.deepcopy(saved) if make is not torchao else None
    opt = getattr(to, kind)(parameters(), lr=0.5, backend="eager", state_dtype=state_dtype)
    converted = to.convert_state_dict(opt, saved)
    if before is not None:
        torch.testing.assert_close(saved, before, rtol=0, atol=0)
    opt.load_state_dict(converted)
    group, counts = opt.param_groups[0], kind in ("Adam", "AdamW", "RAdam", "RMSprop", "Adagrad")
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.01), 0.0)
    assert isinstance(group["lr"], float)
    if kind not in ("SGD", "RMSprop", "Adagrad"):
        assert group["betas"] == BETAS
    if kind == "SGD":
        assert group["momentum"] == 0.9
    if kind == "RMSprop":
        assert group["alpha"] == 0.95
    for p, state in zip(group["params"], expected, strict=True):
        own = dict(opt.state[p])
        if counts:
            assert own.pop("step") == STEP
        torch.testing.assert_close(own, state, rtol=1e-6, atol=1e-7)
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    opt.step()


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_another_library_is_refused_by_name(name: str) -> None:
    make, kind = SAVED[name]
    opt = getattr(to, kind)(parameters(), backend="eager")
    with Unchanged(opt), pytest.raises(ValueError, match=f"saved by {name.split()[0]}") as error:
        opt.load_state_dict(make(kind)[0])
    explains(error, kind, "convert_state_dict")


@pytest.mark.parametrize("name", ["bitsandbytes Adam", "torchao Adam", "optimi Adam", "flashoptim Adam"])
@pytest.mark.parametrize("cls", [to.NAdam, to.Muon, to.Adafactor])
def test_an_optimizer_that_the_library_has_not(name: str, cls: Any) -> None:
    make, kind = SAVED[name]
    p = Parameter(torch.ones(5, 60))
    with pytest.raises(ValueError, match=name.split()[0]) as error:
        to.convert_state_dict(cls([p], backend="eager"), make(kind)[0])
    explains(error, cls.__name__)


WRONG: dict[str, Any] = {
    "two states for one": (to.Lion, lambda: bitsandbytes("Adam")[0], "state2"),
    "one state for two": (to.AdamW, lambda: bitsandbytes("Lion")[0], "state1"),
    "AdEMAMix": (to.AdamW, lambda: stacked(bitsandbytes("Adam", 32)[0]), "state1"),
    "LAMB": (to.AdamW, lambda: more(bitsandbytes("Adam")[0], unorm_vec=torch.ones(1)), "unorm_vec"),
    "blocks of no known size": (to.Lion, lambda: halved(bitsandbytes("Lion")[0]), "0 scales"),
    "Adan": (to.AdamW, lambda: more(optimi("AdamW")[0], prev_grad=torch.ones(5, 60)), "prev_grad"),
    "decoupled decay of SGD": (to.SGD, lambda: in_group(optimi("SGD")[0], decouple_wd=True, weight_decay=0.1), "SGD"),
    "fewer parameters": (to.AdamW, lambda: in_group(optimi("AdamW")[0], params=[0]), "groups of"),
    "other states": (to.Lion, lambda: flashoptim("AdamW")[0], "exp_avg_sq"),
}


def stacked(saved: Any) -> Any:
    parts = saved["state"][0]["__bnb_optimizer_quant_state__"]
    parts["state1"] = torch.stack((parts["state1"], parts["state1"]))
    return saved


def halved(saved: Any) -> Any:
    parts = saved["state"][0]["__bnb_optimizer_quant_state__"]
    parts["absmax1"] = parts["absmax1"][:0]
    return saved


def more(saved: Any, **names: Any) -> Any:
    saved["state"][0] |= names
    return saved


def in_group(saved: Any, **names: Any) -> Any:
    saved["param_groups"][0] |= names
    return saved


@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_converted(name: str) -> None:
    cls, make, says = WRONG[name]
    opt = cls(parameters(), backend="eager")
    with Unchanged(opt), pytest.raises(ValueError, match=says) as error:
        to.convert_state_dict(opt, make())
    explains(error)


def test_other_forms_of_the_same() -> None:
    """Flat states of older bitsandbytes, uncompressed ones of flashoptim, 32 bits; and ours, which stay as they are."""
    opt = to.AdamW(parameters(), backend="eager")
    for saved, expected in (
        bitsandbytes("AdamW", wrapped=False),
        bitsandbytes("AdamW", bits=32),
        flashoptim("AdamW", compressed=False),
    ):
        opt.load_state_dict(to.convert_state_dict(opt, saved))
        for p, state in zip(opt.param_groups[0]["params"], expected, strict=True):
            torch.testing.assert_close({n: opt.state[p][n] for n in state}, state, rtol=1e-6, atol=1e-7)
    own = opt.state_dict()
    assert to.convert_state_dict(opt, own) == own


def test_bitsandbytes_adam_decays_as_adamw() -> None:
    opt = to.Adam(parameters(), backend="eager")
    opt.load_state_dict(to.convert_state_dict(opt, bitsandbytes("Adam")[0]))
    assert opt.param_groups[0]["decoupled_weight_decay"] is True


def test_decay_and_kahan_summation_of_optimi() -> None:
    saved, _ = optimi("AdamW")
    kept = [torch.full(shape, 2.0**-12, dtype=torch.bfloat16) for shape in SHAPES]
    for i, own in enumerate(kept):
        saved["state"][i]["kahan_comp"] = own
    in_group(saved, decouple_lr=True, weight_decay=1e-3, max_lr=0.02)
    params = [Parameter(p.detach().bfloat16()) for p in parameters()]
    opt = to.AdamW(params, param_precision="kahan", backend="eager")
    opt.load_state_dict(to.convert_state_dict(opt, saved))
    assert opt.param_groups[0]["weight_decay"] == pytest.approx(1e-3 / 0.02)
    for p, own in zip(params, kept, strict=True):
        assert torch.equal(master(p, opt), p.detach().float() + own.float())


def test_what_flashoptim_keeps_of_the_weights_is_left_out_with_a_warning() -> None:
    opt = to.AdamW(parameters(), backend="eager")
    saved = more(flashoptim("AdamW")[0], error_bits=torch.zeros(5, 60))
    with pytest.warns(UserWarning, match=r"error_bits of parameter 0.*load_master_state_dict"):
        converted = to.convert_state_dict(opt, saved)
    opt.load_state_dict(converted)


def test_a_state_without_memory_names_its_class() -> None:
    """Of a library that is not known by name."""
    opt = to.AdamW(parameters(), backend="eager")
    saved, _ = torchao("AdamW")
    with pytest.MonkeyPatch.context() as patch, Unchanged(opt):
        patch.delattr(Coded, "dequantize")
        with pytest.raises(RuntimeError, match=r"exp_avg of parameter 0 is a test_foreign\.Coded") as error:
            opt.load_state_dict(saved)
    explains(error)


# With the libraries themselves, where they are installed (the extra `peers`).


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "theirs", "ours"),
    [
        ("bitsandbytes.optim", "AdamW", "AdamW"),
        ("bitsandbytes.optim", "SGD", "SGD"),
        ("bitsandbytes.optim", "RMSprop", "RMSprop"),
        ("bitsandbytes.optim", "Adagrad", "Adagrad"),
        ("optimi", "AdamW", "AdamW"),
        ("optimi", "RAdam", "RAdam"),
        ("optimi", "Lion", "Lion"),
        ("flashoptim", "FlashAdamW", "AdamW"),
        ("flashoptim", "FlashSGD", "SGD"),
    ],
)
def test_beside_the_library_itself(library: str, theirs: str, ours: str) -> None:
    options: dict[str, Any] = {"lr": 0.01}
    if library == "flashoptim":
        options |= {"quantize": False, "fused": False, "master_weight_bits": None}
    if library == "optimi":
        options["triton"] = False
    if ours == "SGD":
        options["momentum"] = 0.9
    params = parameters()
    first = getattr(pytest.importorskip(library), theirs)(params, **options)

    def train(own: Any, opt: Any, steps: range) -> None:
        for step in steps:
            random = torch.Generator().manual_seed(step)
            for p in own:
                p.grad = torch.randn(p.shape, generator=random)
            opt.step()

    train(params, first, range(3))
    twins = [Parameter(p.detach().clone()) for p in params]
    second = getattr(to, ours)(twins, backend="eager")
    second.load_state_dict(to.convert_state_dict(second, copy.deepcopy(first.state_dict())))
    train(params, first, range(3, 6))
    train(twins, second, range(3, 6))
    torch.testing.assert_close(twins, params, rtol=1e-5, atol=1e-6)
