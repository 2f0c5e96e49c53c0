"""What `.ci/package.sh` asks of the wheel where it is installed: it is what is imported, and all four backends step."""

import sysconfig
from importlib.metadata import version

import torch

import triton_optim
from triton_optim import kernels

for module in (triton_optim, kernels):
    assert module.__file__.startswith(sysconfig.get_path("purelib")), module.__file__
assert version("triton-optim") == triton_optim.__version__
for backend in ("triton", "cpp", "compiled", "eager"):
    p = torch.nn.Parameter(torch.ones(100))
    p.grad = torch.ones(100)
    optimizer = triton_optim.SGD([p], lr=0.25, backend=backend)
    optimizer.step()
    assert p.tolist() == [0.75] * 100, backend
    assert triton_optim.explain(optimizer)[0].backend == backend
