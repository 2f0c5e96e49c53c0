"""What tests compare of state dicts: structure, dtypes, bits."""

import io

import torch
from table import CASES

BY_NAME = {case.name: case for case in CASES}
ADAMW, SGD = BY_NAME["AdamW"], BY_NAME["SGD"]


def bits(tensor):
    return tensor.detach().cpu().reshape(-1).view(torch.uint8)


def assert_bitwise(tensor, expected):
    assert tensor.dtype == expected.dtype
    assert tensor.shape == expected.shape
    assert torch.equal(bits(tensor), bits(expected))


def assert_same_states(saved, expected):
    """Two state dicts: the same parameters and keys, and the same bits."""
    assert set(saved["state"]) == set(expected["state"])
    for i, state in expected["state"].items():
        assert set(saved["state"][i]) == set(state)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert_bitwise(saved["state"][i][key], value)
            else:
                assert saved["state"][i][key] == value


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def model(case, device):
    torch.manual_seed(0)
    sizes, bias = ((3, 4), (4, 2)), not case.matrices
    return torch.nn.Sequential(*(torch.nn.Linear(*size, bias=bias) for size in sizes)).to(device)
