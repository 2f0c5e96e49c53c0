"""How two processes share the work on matrices that are sharded, and what they send each other."""

import math

import pytest
import torch
from one_step import step_with
from sharding import Watch, sharded, values
from torch.distributed.tensor import Replicate, Shard
from torch.nn import Parameter

import triton_optim as to
from triton_optim.optimizers.matrix import momenta, owners
from triton_optim.optimizers.matrix.newton_schulz import newton_schulz


def matrices(mesh, name, placement, shapes, options):
    """After 3 steps beside one process's: how far apart, how many elements this rank iterated in the last step, in how
    many collectives.
    """
    iterated = []

    def counted(each, *others):
        iterated.extend(math.prod(m.shape) for m in each)
        return newton_schulz(each, *others)

    starts = [values(shape, i, "cpu") for i, shape in enumerate(shapes)]
    # One is whole on every rank, in a group with the others.
    placed = [Parameter(sharded(x, mesh, [placement])) for x in starts]
    plain = [Parameter(x.clone()) for x in starts]
    placed[0] = Parameter(starts[0].clone())
    opt, twin = (getattr(to, name)([{"params": own, **options}], lr=0.1, backend="eager") for own in (placed, plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(momenta, "newton_schulz", counted)
        patch.setattr(owners, "LARGEST_ROUND", 64)  # elements: of these matrices three rounds
        for k in range(3):
            gradients = [values(p.shape, 10 * k + i, "cpu") for i, p in enumerate(plain)]
            own = [gradients[0], *(sharded(g, mesh, [placement]) for g in gradients[1:])]
            step_with(twin, plain, [g.clone() for g in gradients])
            iterated.clear()
            with Watch() as watch:
                step_with(opt, placed, own)
    wholes = [placed[0], *(p.full_tensor() for p in placed[1:])]
    apart = max((p - q).abs().max().item() for p, q in zip(wholes, plain, strict=True))
    return apart, sum(iterated) - starts[0].numel(), len(watch.collectives)


EXPERTS = {"extra_dims": "batch"}


@pytest.mark.parametrize("name", ["Muon", "NorMuon"])
@pytest.mark.parametrize(
    ("placement", "shapes", "options", "communicates"),
    [
        (Shard(0), [(3, 5), (12, 8), (8, 12), (9, 9), (5, 7), (1, 3)], {}, True),
        (Shard(1), [(3, 5), (12, 8), (7, 12), (9, 9), (1, 7), (3, 1)], {}, True),
        (Shard(0), [(2, 3, 5), (3, 4, 6), (1, 4, 6)], EXPERTS, False),
        (Shard(2), [(2, 3, 5), (3, 4, 6), (1, 4, 6)], EXPERTS, True),
    ],
    ids=["rows", "columns", "experts", "within experts"],
)
def test_sharded_matrices_are_shared_out(name, placement, shapes, options, communicates, ranks):
    (apart, own, collectives), (other_apart, others, _) = ranks.run(matrices, name, placement, shapes, options)
    assert max(apart, other_apart) < 2**-20  # eight roundings of float32, of weights of the size of 1
    assert own + others == sum(math.prod(shape) for shape in shapes[1:])  # each once
    if communicates:
        assert min(own, others) > 0
    # Two a round: there and back. Of experts that lie whole on a rank nothing is sent, unless a norm of each is kept.
    rounds = 3 if options == {} else 1
    assert collectives == (2 * rounds if communicates or name == "NorMuon" else 0)


def summed_or_decomposed(mesh, name, placement, more=()):
    """After 3 steps beside one process's: how far apart, how many elements were sent in the last step, and how many
    matrices each process decomposed.
    """
    shapes = [(40, 30), (40, 30), (3, 20, 10), (1, 9), (7,), ()]
    starts = [values(shape, i, "cpu") for i, shape in enumerate(shapes)]
    kinds = [[placement if len(shape) > 1 else Shard(0) if shape else Replicate()] for shape in shapes]
    placed = [Parameter(sharded(x, mesh, kind)) for x, kind in zip(starts, kinds, strict=True)]
    plain = [Parameter(x.clone()) for x in starts]
    options = {"beta1": 0.9, "weight_decay": 0.1} if name == "AdafactorRelative" else {}
    if name in ("SOAP", "Shampoo"):
        options |= {"max_precond_dim": 30, "precondition_frequency": 2} | dict(more)
    opt, twin = (getattr(to, name)(own, lr=0.1, backend="eager", **options) for own in (placed, plain))
    many = {"own": 0, "twin": 0}
    qr, eigh = torch.linalg.qr, torch.linalg.eigh

    def counting(decompose):
        def counted(x):
            many[whose] += len(x)
            return decompose(x)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "qr", counting(qr))
        patch.setattr(torch.linalg, "eigh", counting(eigh))
        for k in range(3):
            gradients = [values(p.shape, 10 * k + i, "cpu") for i, p in enumerate(plain)]
            whose = "twin"
            step_with(twin, plain, [g.clone() for g in gradients])
            whose = "own"
            with Watch() as watch:
                step_with(opt, placed, [sharded(g, mesh, kind) for g, kind in zip(gradients, kinds, strict=True)])
    apart = max((p.full_tensor() - q).abs().max().item() for p, q in zip(placed, plain, strict=True))
    return apart, sum(math.prod(shape) for _, *carried in watch.collectives for shape, _ in carried), many


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["Adafactor", "AdafactorRelative", "CAME"])
def test_rows_and_columns_are_summed_where_they_lie(name, placement, ranks):
    for apart, sent, _ in ranks.run(summed_or_decomposed, name, placement):
        assert apart < 2**-18  # of weights of the size of 4
        # Rows and columns, vectors and norms; of CAME twice. There are 3,017 elements.
        assert sent <= (1 + (name == "CAME")) * (70 + 70 + 3 * 30 + 10 + 7 + 2 * 6)


@pytest.mark.parametrize("name", ["SOAP", "Shampoo"])
def test_ranks_share_decompositions(name, ranks):
    (apart, _, one), (other_apart, _, other) = ranks.run(summed_or_decomposed, name, Shard(0))
    assert apart == other_apart == 0
    # Of four matrices each time two are of one shape, and shared.
    assert one["own"] == other["own"] == one["twin"] * 3 / 4 > 0


def test_ranks_share_the_blocks_of_matrices(ranks):
    # On some processors the last bits of what LAPACK makes of a matrix depend on where in a batch it begins; of odd
    # sizes, which begin at no multiple of 16 bytes, so do the directions.
    found = ranks.run(summed_or_decomposed, "Shampoo", Shard(0), {"block_size": 16})
    assert all(apart < 2**-18 for apart, _, _ in found)  # of weights of the size of 4
    # In the second step: of the first two matrices 6 blocks each, of the third 13, and of each block two sides; the
    # one row has one side, a matrix alone, which every rank decomposes.
    together = 2 * (6 + 6 + 13)
    assert {many["twin"] for _, _, many in found} == {together + 1}
    own = [many["own"] for _, _, many in found]
    assert sum(own) == together + 2
    assert min(own) > together / 3
