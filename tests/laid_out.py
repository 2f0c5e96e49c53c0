"""Tensors as they may lie in memory, and optimizers of them beside the float64 reference."""

import torch
from table import CASES, KINDS, rows_and_backends

LR = 0.1  # an element that gets another one's gradient is then off by more than any dtype rounds
# Of others, what becomes of an element depends on its row, its column or the whole matrix.
ELEMENTWISE = [case for case in KINDS if case.elementwise and not case.sparse]
BY_NAME = {case.name: case for case in CASES}
each_elementwise_and_backend = rows_and_backends(*ELEMENTWISE)
SHAPE = (2, 3, 4, 2)


OUTSIDE = 96.0  # exact in every dtype


def in_buffer(values, offset=0):
    """The same layout, `offset` elements into a buffer that is OUTSIDE everywhere else."""
    buffer = values.new_full((values.numel() + offset + 16,), OUTSIDE)
    return buffer.as_strided(values.shape, values.stride(), offset).copy_(values)


def permuted(t, *order):
    """The same values, with dimension order[0] the slowest in memory."""
    return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])


DENSE = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "reversed": lambda t: permuted(t, 3, 2, 1, 0),
    "permuted": lambda t: permuted(t, 2, 0, 3, 1),
}
# What autograd may hand over besides. All but the expanded one hold t's values.
GRADIENTS = DENSE | {
    "gappy": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0],
    "expanded": lambda t: t[:1, :, :1, :1].expand(t.shape),
    "misaligned": lambda t: in_buffer(t, 1),
    "lazily negated": lambda t: torch._neg_view(-t),
    "with a graph": lambda t: t.clone().requires_grad_() * 1,
}


def random_values(shape, seed, device):
    """Values whose sign depends on the place alone, of magnitude 0.5 to 2: then no rule's update is ill-conditioned."""
    shape = tuple(shape)
    signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))) * 2.0 - 1
    sizes = 0.5 + 1.5 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (signs * sizes).to(device)


def optimizer(name, params, backend, **settings):
    case = BY_NAME[name]
    return case.ours(params, **(case.settings | {"lr": LR} | settings), backend=backend)


def array(t):
    return t.detach().cpu().double().numpy()


def assert_same(actual, expected, what=""):
    """Equal in every bit; on a GPU, where a masked tail may be contracted to other FMAs, to within 1e-6."""
    tolerance = 1e-6 if actual.is_cuda else 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def assert_close(actual, expected, tolerance, what=""):
    torch.testing.assert_close(
        actual.detach().cpu().double(),
        torch.as_tensor(expected),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda m: f"{what}: {m}",
    )


def assert_is_reference(name, opt, params, starts, gradients, **settings):
    """Parameters and states after one step for each list of `gradients`, against the float64 reference.

    Each step may cost one rounding of the coarsest dtype that is stored and eight of the arithmetic, at values of
    order 1.
    """
    case = BY_NAME[name]
    steps = [[None if g is None else array(g) for g in row] for row in gradients]
    values, states = case.reference(
        [array(start) for start in starts], steps, **(case.settings | {"lr": LR} | settings)
    )
    for i, (p, value, state) in enumerate(zip(params, values, states, strict=True)):
        compute = torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32).eps
        stored = [p, *(opt.state[p][key] for key in state if key not in case.numbers)]
        tolerance = len(steps) * (max(torch.finfo(t.dtype).eps for t in stored) + 8 * compute)
        assert_close(p, value, tolerance, f"parameter {i}")
        for key, expected in state.items():
            actual = opt.state[p].get(key)
            if key == "step":
                assert actual is None or actual.item() == expected, f"step of parameter {i}"
            else:
                assert_close(actual, expected, tolerance, f"{key} of parameter {i}")
