"""Run PyTorch's own tests of torch.optim on our optimizers.

    python tests/against_pytorch.py PATH/TO/pytorch/test/test_optim.py [pytest's arguments]

The file is PyTorch's, from its repository and of the installed version; beside it must lie its folder ``optim``. Every
class of torch.optim that triton_optim has too is replaced by ours before the file is imported. Exits with pytest's
status: 0 only if every test passes but those in ``CANNOT_PASS``, and each of these fails.
"""

import fnmatch
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal import common_optimizers

import triton_optim

# Test names (fnmatch) that cannot pass, and why.
CANNOT_PASS = {
    "test_defaults_changed_to_foreach_*": "mocks torch's private function of the optimizer (_multi_tensor_adam)",
}


def replace_optimizers() -> list[str]:
    """Put our classes in the places of torch.optim's, wherever torch has bound them, and name them."""
    ours = {}
    for name in torch.optim.__all__:
        theirs, twin = getattr(torch.optim, name, None), getattr(triton_optim, name, None)
        if isinstance(theirs, type) and isinstance(twin, type) and twin is not theirs:
            ours[theirs] = twin
    for info in common_optimizers.optim_db:
        info.optim_cls = ours.get(info.optim_cls, info.optim_cls)
    modules = [module for name, module in sys.modules.items() if name.split(".")[:2] == ["torch", "optim"]]
    for module in [*modules, common_optimizers]:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value in ours:
                setattr(module, name, ours[value])
    return sorted(theirs.__name__ for theirs in ours)


class Expectations:
    """A pytest plugin that marks what cannot pass, and says at the end what ran."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for pattern, reason in CANNOT_PASS.items():
                if fnmatch.fnmatchcase(item.name, pattern):
                    item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
                    self.counts[pattern] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        ran = {name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "xfailed", "skipped")}
        terminalreporter.write_line(
            "{passed} passed, {failed} failed, {xfailed} cannot pass, {skipped} skipped".format(**ran)
        )
        for pattern, count in self.counts.items():
            terminalreporter.write_line(f"cannot pass: {pattern} ({count}): {CANNOT_PASS[pattern]}")


def main() -> int:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    print("ours in the place of torch.optim's:", ", ".join(replace_optimizers()))
    # Our pyproject.toml is not for these tests: it makes errors of warnings that they expect.
    options = ["-c", os.devnull, "-p", "no:cacheprovider", "-q", "--tb=short"]
    return int(pytest.main([*options, *sys.argv[1:]], plugins=[Expectations()]))


if __name__ == "__main__":
    sys.exit(main())
