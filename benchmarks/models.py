"""Models as lists of parameter shapes: what an optimizer sees of them."""

from collections.abc import Iterator

import torch

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """He et al. 2016, Table 1, https://arxiv.org/abs/1512.03385, as torchvision builds it: 161 tensors, 25.6M."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    incoming = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, incoming, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, incoming, 1, 1), (4 * width,), (4 * width,)]
            incoming = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> Shapes:
    """The 2-D hidden matrices of Radford et al. 2019's smallest, as nn.Linear holds them: 48 tensors, 84.9M."""
    width = 768
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * 12


MODELS: dict[str, Shapes] = {
    "64M in 16": [(1 << 22,)] * 16,
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2_small(),
    "1000 x 1k": [(1000,)] * 1000,
    "1000 x 1024": [(1024,)] * 1000,
    "1e9": [(10_000_000,)] * 100,
    "1000 x 1": [(1,)] * 1000,
}


def parameters(name: str, device: torch.device | str = "cpu", seed: int = 0) -> Iterator[torch.nn.Parameter]:
    """Parameters of `MODELS[name]` with gradients. Equal for equal seeds, so that two optimizers can be compared.

    Never zeros: they are faster than data, and hide what was not written.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for shape in MODELS[name]:
        p = torch.nn.Parameter(torch.randn(shape, device=device, generator=generator))
        p.grad = torch.randn(shape, device=device, generator=generator)
        yield p


def elements(name: str) -> int:
    """How many parameters the model has, all tensors together."""
    return sum(torch.Size(shape).numel() for shape in MODELS[name])
