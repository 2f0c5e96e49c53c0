"""Models, peers, measuring and the command of `triton-optim bench`. Nothing here depends on how long anything takes."""

from __future__ import annotations

import pytest

from triton_optim.bench import models

# Parameters and tensors, as published or as counted in the implementations that the docstrings name.
COUNTS = {
    "resnet50": (25_557_032, 161),
    "vit_b16": (86_567_656, 152),
    "gpt2": (124_439_808, 148),
    "llama3_1b": (1_235_814_400, 146),
    "llama3_8b": (8_030_261_248, 291),
    "sd15_unet": (859_520_964, 686),
    "moe_many_experts": (6_919_161_856, 3_219),
    "1000x1k": (1_000_000, 1_000),
    "10000x64": (640_000, 10_000),
    "64M16": (1 << 26, 16),
}


@pytest.mark.parametrize("name", models.NAMED)
def test_a_models_parameters_are_those_published(name: str) -> None:
    shapes = models.shapes(name)
    assert (models.elements(shapes), len(shapes)) == COUNTS[name]


@pytest.mark.parametrize("name", ["resnet51", "0x3", "3x", "x3", "3x3G"])
def test_an_unknown_model_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is none. Choose from resnet50, .* COUNTxSIZE"):
        models.shapes(name)
