"""With torchao's own tensors, where it is installed (extra ``peers``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import triton_optim as to

torchao: Any = pytest.importorskip("torchao", reason='torchao is not installed: pip install -e ".[peers]"')
pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao's own


def float8_model() -> Any:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))
    return convert_to_float8_training(
        model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    )


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"backend": "eager"}], ids=str)
def test_a_float8_model_is_stepped_as_by_torch(options: dict[str, Any]) -> None:
    ended = []
    for kind, own in ((torch.optim.AdamW, {"foreach": False}), (to.AdamW, options)):
        model = float8_model()
        params = list(model.parameters())
        assert type(params[0]).__name__ == "WeightWithDynamicFloat8CastTensor"
        opt: Any = kind(params, lr=0.1, **own)
        random = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random)
            opt.step()
        ended.append([getattr(p.detach(), "_tensor", p.detach()) for p in params])
    for theirs, ours in zip(*ended, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_pinned_backend_refuses_a_float8_model() -> None:
    with pytest.raises(RuntimeError, match="only its own operations reach"):
        to.AdamW(float8_model().parameters(), lr=0.1, backend="compiled")
