"""Models as lists of parameter shapes: what an optimizer sees of them.

They follow from the definitions of the architectures; nothing is downloaded. Shapes are as torch's modules hold them:
a linear layer is (outputs, inputs).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..util.named import load

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
    return [*shapes, *linear(1000, 2048)]


def vit_b16() -> Shapes:
    """Dosovitskiy et al. 2021, Table 1, https://arxiv.org/abs/2010.11929, as torchvision builds it: 86.6M."""
    width, image, patch = 768, 224, 16
    shapes: Shapes = [(1, 1, width), (width, 3, patch, patch), (width,), (1, (image // patch) ** 2 + 1, width)]
    return [*shapes, *transformer_layer(width) * 12, *norm(width), *linear(1000, width)]


def gpt2() -> Shapes:
    """Radford et al. 2019's smallest, https://github.com/openai/gpt-2; the output layer is the embedding: 124M."""
    width = 768
    return [(50257, width), (1024, width), *transformer_layer(width) * 12, *norm(width)]


def llama3_1b() -> Shapes:
    """Llama-3.2-1B of https://arxiv.org/abs/2407.21783; the output layer is the embedding: 1.24e9."""
    width = 2048
    return [(128256, width), *llama_layer(width, 8 * 64, 8192) * 16, (width,)]


def llama3_8b() -> Shapes:
    """Llama-3-8B of https://arxiv.org/abs/2407.21783, Table 3: 8.03e9."""
    width = 4096
    return [(128256, width), *llama_layer(width, 8 * 128, 14336) * 32, (width,), (128256, width)]


def moe_many_experts() -> Shapes:
    """OLMoE-1B-7B, https://arxiv.org/abs/2409.02060, each expert's layers by themselves: 3,219 tensors, 6.92e9."""
    width, hidden, experts = 2048, 1024, 64
    attention: Shapes = [(width, width)] * 4 + [(width,)] * 2
    expert: Shapes = [(hidden, width), (hidden, width), (width, hidden)]
    layer = [*attention, (experts, width), *expert * experts, (width,), (width,)]
    return [(50304, width), *layer * 16, (width,), (50304, width)]


def sd15_unet() -> Shapes:
    """Stable Diffusion 1.5's network, https://arxiv.org/abs/2112.10752, as diffusers builds it: 686 tensors, 860M."""
    channels = (320, 640, 1280, 1280)
    shapes = [*conv(320, 4, 3), *linear(1280, 320), *linear(1280, 1280)]
    skips = [320]
    incoming = 320
    for level, width in enumerate(channels):
        for _ in range(2):
            shapes += unet_residual(width, incoming)
            shapes += unet_attention(width) if level < 3 else []
            incoming = width
            skips.append(width)
        if level < 3:
            shapes += conv(width, width, 3)
            skips.append(width)
    shapes += [*unet_residual(1280, 1280), *unet_attention(1280), *unet_residual(1280, 1280)]
    for level, width in reversed([*enumerate(channels)]):
        for _ in range(3):
            shapes += unet_residual(width, incoming + skips.pop())
            shapes += unet_attention(width) if level < 3 else []
            incoming = width
        if level > 0:
            shapes += conv(width, width, 3)
    return [*shapes, *norm(320), *conv(4, 320, 3)]


def norm(width: int) -> Shapes:
    """Weight and bias."""
    return [(width,), (width,)]


def linear(outputs: int, inputs: int) -> Shapes:
    """Weight and bias."""
    return [(outputs, inputs), (outputs,)]


def conv(outputs: int, inputs: int, kernel: int) -> Shapes:
    """Weight and bias."""
    return [(outputs, inputs, kernel, kernel), (outputs,)]


def transformer_layer(width: int) -> Shapes:
    """Attention with one matrix for queries, keys and values, and a perceptron four times as wide."""
    attention = [*norm(width), *linear(3 * width, width), *linear(width, width)]
    return [*attention, *norm(width), *linear(4 * width, width), *linear(width, 4 * width)]


def llama_layer(width: int, keys: int, hidden: int) -> Shapes:
    """Attention whose keys and values are `keys` wide, and a gated perceptron; no biases."""
    attention: Shapes = [(width, width), (keys, width), (keys, width), (width, width)]
    return [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]


def unet_residual(width: int, incoming: int) -> Shapes:
    """Two convolutions, with the time step in between, and a third one where the width changes."""
    block = [*norm(incoming), *conv(width, incoming, 3), *linear(width, 1280), *norm(width), *conv(width, width, 3)]
    return block + (conv(width, incoming, 1) if width != incoming else [])


def unet_attention(width: int, text: int = 768) -> Shapes:
    """Self-attention, attention to the text and a gated perceptron, between two convolutions of size 1."""
    to_itself = [*norm(width), *[(width, width)] * 3, *linear(width, width)]
    to_text = [*norm(width), (width, width), (width, text), (width, text), *linear(width, width)]
    perceptron = [*norm(width), *linear(8 * width, width), *linear(width, 4 * width)]
    return [*norm(width), *conv(width, width, 1), *to_itself, *to_text, *perceptron, *conv(width, width, 1)]


NAMED: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "vit_b16": vit_b16,
    "gpt2": gpt2,
    "llama3_1b": llama3_1b,
    "llama3_8b": llama3_8b,
    "sd15_unet": sd15_unet,
    "moe_many_experts": moe_many_experts,
    "1000x1k": lambda: equal_tensors("1000x1k"),
    "10000x64": lambda: equal_tensors("10000x64"),
    "64M16": lambda: [(1 << 22,)] * 16,
}
UNITS = {"": 1, "k": 1_000, "M": 1_000_000}


def equal_tensors(name: str) -> Shapes:
    """``COUNTxSIZE``: so many vectors of so many elements, `SIZE` in units, thousands (k) or millions (M)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)([kM]?)", name)
    if match is None:
        raise ValueError(
            f"model {name!r}: there is none. Choose from {', '.join(NAMED)}, or COUNTxSIZE, such as 500x20k."
        )
    count, size, unit = match.groups()
    return [(int(size) * UNITS[unit],)] * int(count)


def shapes(name: str) -> Shapes:
    """The shapes of a model's parameters.

    Args:
        name: one of `NAMED`, or ``COUNTxSIZE`` for that many vectors of that many elements, such as ``1000x1k``.

    Raises:
        ValueError: there is no such model.

    Example:
        >>> from triton_optim.bench.models import elements, shapes
        >>> len(shapes("resnet50")), elements(shapes("resnet50")), shapes("3x2k")
        (161, 25557032, [(2000,), (2000,), (2000,)])
    """
    return NAMED[name]() if name in NAMED else equal_tensors(name)


def own_shapes(name: str) -> Shapes:
    """The shapes of the parameters of the `torch.nn.Module` that ``module:name`` returns; tied ones count once.

    Raises:
        ValueError: it is not there, or returns no module with parameters that are trained.
    """
    model = load("--model", name)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} returned {type(model).__name__}. Return a torch.nn.Module.")
    shapes: Shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    if not shapes:
        raise ValueError(f"--model {name} returned a module with no parameter to train. Return one that has some.")
    return shapes


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    """How many parameters all of them have together."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def parameters(
    shapes: Sequence[tuple[int, ...]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Iterator[nn.Parameter]:
    """Parameters with gradients, equal for equal seeds, so that two optimizers can be compared.

    They are random, never zeros: those are faster than data, and hide what was not written.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, device=device, generator=generator).to(dtype))
        p.grad = torch.randn(shape, device=device, generator=generator).to(dtype)
        yield p
