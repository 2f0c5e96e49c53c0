"""Parameters that are several matrices: batches, convolutions and fused weights, of Muon and what is made of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from one_step import step_with
from sharding import playing, sharded
from torch import Tensor
from torch.distributed.tensor import Replicate
from torch.nn import Parameter

import triton_optim
from triton_optim.optimizers.matrix import newton_schulz as module
from triton_optim.optimizers.matrix.pieces import Pieces

OF_MUON = ["Muon", "NorMuon", "AdaMuon", "MuonH", "Scion"]
of_muon = pytest.mark.parametrize("name", OF_MUON)
# The shape of a parameter, what its group says, and the matrices that it is of: a view as many rows by columns, and the
# rows of each.
WAYS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, int], list[int]]] = {
    "experts": ((3, 4, 5), {"extra_dims": "batch"}, (12, 5), [4, 4, 4]),
    "experts of layers": ((2, 3, 4, 2), {"extra_dims": "batch"}, (24, 2), [4] * 6),
    "one expert": ((1, 4, 5), {"extra_dims": "batch"}, (4, 5), [4]),
    "no experts": ((0, 4, 5), {"extra_dims": "batch"}, (0, 5), []),
    "convolution": ((6, 2, 3, 2), {"extra_dims": "flatten"}, (6, 12), [6]),
    "convolution of sequences": ((6, 2, 1), {"extra_dims": "flatten"}, (6, 2), [6]),
    "queries, keys and values": ((12, 5), {"splits": 3}, (12, 5), [4, 4, 4]),
    "of other sizes": ((8, 3), {"splits": [4, 2, 2]}, (8, 3), [4, 2, 2]),
    "one block": ((8, 3), {"splits": [8]}, (8, 3), [8]),
    "fused experts": ((2, 6, 3), {"extra_dims": "batch", "splits": (4, 2)}, (12, 3), [4, 2, 4, 2]),
    "a matrix in a group of experts": ((4, 5), {"extra_dims": "batch"}, (4, 5), [4]),
}
ways = pytest.mark.parametrize("way", WAYS)


def cut(x: Tensor, way: str) -> list[Tensor]:
    """The matrices of a parameter, or of its gradient."""
    _, _, view, rows = WAYS[way]
    return [piece.clone() for piece in x.reshape(view).split(rows)] if rows else []


def steps(optimizer: Any, params: list[Parameter], gradients: list[list[Tensor]]) -> None:
    for own in gradients:
        step_with(optimizer, params, [g.clone() for g in own])


def whole_and_pieces(name: str, way: str, backend: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """A parameter after four steps, and its matrices, each a parameter, after as many."""
    shape, group, _, _ = WAYS[way]
    random = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=random)
    gradients = [torch.randn(shape, generator=random) for _ in range(4)]
    p, each = Parameter(start.clone()), [Parameter(piece) for piece in cut(start, way)]
    options = {"lr": 0.1, "backend": backend, **options}
    steps(getattr(triton_optim, name)([{"params": [p], **group}], **options), [p], [[g] for g in gradients])
    if each:
        steps(getattr(triton_optim, name)(each, **options), each, [cut(g, way) for g in gradients])
    return p.detach(), [q.detach() for q in each]


@of_muon
@ways
def test_each_matrix_goes_where_it_goes_alone(name: str, way: str) -> None:
    """To the bit: pieces of one shape are one batch, as parameters are."""
    p, each = whole_and_pieces(name, way, "eager")
    found = cut(p, way)
    assert len(found) == len(each)
    for a, b in zip(found, each, strict=True):
        scale = WAYS[way][0][2:] if name == "Scion" and WAYS[way][1] == {"extra_dims": "flatten"} else ()
        if scale and scale != (1,):
            continue  # whose factor is of the channels, not of the flattened matrix
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["experts", "convolution", "of other sizes", "fused experts"])
def test_on_every_backend(way: str, backend: str) -> None:
    p, each = whole_and_pieces("Muon", way, backend)
    for a, b in zip(cut(p, way), each, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("way", ["experts", "convolution", "of other sizes"])
def test_each_matrix_has_the_factor_of_its_shape(way: str, nesterov: bool, adjust: str) -> None:
    p, each = whole_and_pieces("Muon", way, "eager", adjust_lr_fn=adjust, nesterov=nesterov)
    for a, b in zip(cut(p, way), each, strict=True):
        assert torch.equal(a, b)


def test_all_matrices_of_a_shape_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[tuple[int, ...]] = []
    iterate = module.iterate
    monkeypatch.setattr(module, "iterate", lambda x, *rest: (batches.append(tuple(x.shape)), iterate(x, *rest))[1])
    params = [Parameter(torch.randn(shape)) for shape in [(3, 4, 5), (2, 5, 4), (4, 5), (6, 4, 5)]]
    steps(
        triton_optim.Muon([{"params": params, "extra_dims": "batch"}], backend="eager"),
        params,
        [[torch.randn_like(p) for p in params]],
    )
    assert batches == [(12, 4, 5)]


@of_muon
def test_a_momentum_is_formed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches its matrices are in."""
    formed: list[int] = []
    fetching = Pieces.fetching

    def counted(self: Pieces, fetch: Any) -> Any:
        return fetching(self, lambda indices: (formed.extend(indices), fetch(indices))[1])

    monkeypatch.setattr(Pieces, "fetching", counted)
    for largest in ("LARGEST_ON_CPU", "LARGEST_OF_16_BITS"):
        monkeypatch.setattr(module, largest, 20)  # a matrix
    params = [Parameter(torch.randn(10, 5)), Parameter(torch.randn(10, 5))]
    optimizer = getattr(triton_optim, name)([{"params": params, "splits": [4, 2, 4]}], backend="eager")
    steps(optimizer, params, [[torch.randn_like(p) for p in params]])
    assert formed == ([] if name == "Scion" else [0, 1])


@of_muon
def test_channels_last(name: str) -> None:
    """A convolution's memory may lie otherwise than its dimensions."""
    random = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(5, 6, 2, 3, 2, generator=random)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        p = Parameter(start.clone(memory_format=memory_format))
        optimizer = getattr(triton_optim, name)([{"params": [p], "extra_dims": "flatten"}], lr=0.1, backend="eager")
        steps(optimizer, [p], [[g.clone(memory_format=memory_format)] for g in gradients])
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@of_muon
def test_a_resumed_run_goes_on_as_it_would_have(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 5), (6, 5)]
    start = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(5)]

    def build(values: list[Tensor]) -> tuple[list[Parameter], Any]:
        params = [Parameter(x.clone()) for x in values]
        groups = [{"params": params[:1], "extra_dims": "batch", "splits": 2}, {"params": params[1:], "splits": (4, 2)}]
        return params, getattr(triton_optim, name)(groups, lr=0.1, backend="eager")

    params, optimizer = build(start)
    steps(optimizer, params, gradients[:3])
    others, resumed = build([p.detach() for p in params])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, which in ((params, optimizer), (others, resumed)):
        steps(which, own, gradients[3:])
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert resumed.param_groups[0]["splits"] == 2


@of_muon
def test_sharded_parameters(name: str, device: torch.device) -> None:
    """As ordinary ones; here every rank has all of them."""
    start, *gradients = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    group = {"extra_dims": "batch", "splits": (4, 2)}
    ends = []
    with playing(0, device) as mesh:
        for place in (torch.clone, lambda x: sharded(x, mesh, [Replicate()])):
            p = Parameter(place(start))
            optimizer = getattr(triton_optim, name)([{"params": [p], **group}], lr=0.1, backend="eager")
            for g in gradients:
                p.grad = place(g)
                optimizer.step()
            ends.append(p.detach())
        assert torch.equal(ends[0], ends[1].to_local())


def test_a_state_dict_that_does_not_say_it() -> None:
    """Such as torch's: what a group says of its parameters stays."""
    p = Parameter(torch.ones(6, 2))
    theirs = torch.optim.Muon([p])
    p.grad = torch.ones_like(p)
    theirs.step()
    optimizer = triton_optim.Muon([{"params": [p], "splits": 3}], backend="eager")
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["splits"] == 3
    optimizer.step()


@of_muon
def test_gradients_through_the_steps(name: str) -> None:
    def stepped(p: Tensor, g: Tensor) -> Tensor:
        p = p.clone()
        group = {"params": [p], "extra_dims": "batch", "splits": (1, 2)}
        optimizer = getattr(triton_optim, name)([group], lr=0.02, differentiable=True)
        for times in (1, 2, -1):
            p.grad = times * g
            optimizer.step()
        return p

    p, g = (torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(stepped, (p, g), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "group", "said"),
    [
        ((2, 3, 4), {}, r'shape \(2, 3, 4\).*use_muon.*"extra_dims": "batch".*"flatten"'),
        ((2, 3), {"extra_dims": "conv"}, r"Invalid extra_dims: 'conv'.*\"batch\".*\"flatten\""),
        ((3,), {"extra_dims": "batch"}, r"shape \(3,\).*use_muon"),
        ((6, 2), {"splits": 4}, r"Invalid splits: 4 for parameter 0 of shape \(6, 2\), which has 6 rows"),
        ((6, 2), {"splits": [4, 4]}, r"Invalid splits: \[4, 4\].*6 rows.*add up"),
        ((2, 5, 2), {"extra_dims": "batch", "splits": 2}, "Invalid splits: 2.*5 rows"),
        ((6, 2, 1), {"extra_dims": "flatten", "splits": 4}, "Invalid splits: 4.*6 rows"),
        ((6, 2), {"splits": 0}, "Invalid splits: 0. Give the number of blocks"),
        ((6, 2), {"splits": []}, r"Invalid splits: \[\]"),
        ((6, 2), {"splits": [6, 0]}, r"Invalid splits: \[6, 0\]"),
        ((6, 2), {"splits": 1.5}, r"Invalid splits: 1\.5"),
        ((6, 2), {"splits": True}, "Invalid splits: True"),
        ((6, 2), {"splits": "qkv"}, "Invalid splits: 'qkv'"),
    ],
)
def test_what_is_not_cut_so(shape: tuple[int, ...], group: dict[str, Any], said: str) -> None:
    for name in ("Muon", "NorMuon"):
        with pytest.raises(ValueError, match=said):
            getattr(triton_optim, name)([{"params": [Parameter(torch.zeros(shape))], **group}])


def test_a_group_that_is_edited_is_checked() -> None:
    p = Parameter(torch.ones(6, 2))
    optimizer = triton_optim.Muon([p], backend="eager")
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["splits"] = 4
    with pytest.raises(ValueError, match="Invalid splits: 4 for parameter 0"):
        optimizer.step()
    optimizer.param_groups[0]["splits"] = 3
    optimizer.step()


class Block(torch.nn.Module):
    """A bit of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.back = torch.nn.ConvTranspose2d(4, 3, 3)
        self.attention = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 12), "out": torch.nn.Linear(4, 4)})
        self.experts = torch.nn.Module()
        self.experts.up = Parameter(torch.randn(2, 6, 4))
        self.experts.down = Parameter(torch.randn(2, 4, 3))
        self.experts.bias = Parameter(torch.randn(2, 3))
        self.lm_head = torch.nn.Linear(4, 10, bias=False)


def sorted_names(model: torch.nn.Module, **arguments: Any) -> list[tuple[dict[str, Any], list[str]]]:
    """What each group says, and the names of its parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = triton_optim.muon_param_groups(model, **arguments)
    found = [
        ({n: v for n, v in group.items() if n != "params"}, [names[id(p)] for p in group["params"]]) for group in groups
    ]
    triton_optim.Muon(groups)
    return found


def test_a_model_is_sorted_in_one_call() -> None:
    found = sorted_names(
        Block(), convolutions=True, experts="experts", splits={"qkv": 3, "experts.up": 2}, adamw={"lr": 0.1}
    )
    rest = ["conv.bias", "back.weight", "back.bias", "attention.qkv.bias", "attention.out.bias", "experts.bias"]
    assert found == [
        ({}, ["attention.out.weight"]),
        ({"extra_dims": "flatten"}, ["conv.weight"]),
        ({"splits": 3}, ["attention.qkv.weight"]),
        ({"extra_dims": "batch", "splits": 2}, ["experts.up"]),
        ({"extra_dims": "batch"}, ["experts.down"]),
        ({"use_muon": False, "lr": 0.1}, ["embedding.weight", *rest, "lm_head.weight"]),
    ]


def test_what_is_not_asked_for_stays_adamws() -> None:
    muons, adamws = sorted_names(Block())
    assert muons == ({}, ["attention.qkv.weight", "attention.out.weight"])
    assert {"conv.weight", "experts.up", "experts.down"} <= {*adamws[1]}


@pytest.mark.parametrize("arguments", [{"experts": ["experts", "expert"]}, {"splits": {"expert": 2}}])
def test_a_name_that_the_model_has_not(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"the name 'expert', given in {next(iter(arguments))}"):
        triton_optim.muon_param_groups(Block(), **arguments)
