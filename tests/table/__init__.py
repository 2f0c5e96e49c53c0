"""One row an optimizer: all that the tests need to know of it. Adding an optimizer is adding its row.

The rows lie in a file a family, in `ROWS`; case.py says what a row may hold. The reference of one that torch has is in
references.py, where it is compared with torch's. Of any other it is in another of the references_*.py or here, above
the rows, as references.py says how; the row has steps worked out by hand to compare it with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from torch import Tensor

from triton_optim.spec import Update

from . import adams, elementwise, matrices, measured, schedule_free, torchs
from .case import Case as Case

FAMILIES = (torchs, elementwise, adams, schedule_free, measured, matrices)
CASES = [case for family in FAMILIES for case in family.ROWS]

REFERENCES = {case.name: case.reference for case in CASES}


def array(g: Tensor | None) -> Any:
    """A gradient as the references take it: a sparse one masked where it holds nothing."""
    if g is None or not g.is_sparse:
        return None if g is None else g.detach().cpu().double().numpy()
    held = torch.sparse_coo_tensor(g._indices(), torch.ones_like(g._values()), g.shape, check_invariants=True)
    plain = g.detach().cpu().double().to_dense().numpy()
    return np.ma.MaskedArray(plain, mask=(held.cpu().to_dense() == 0).numpy())


def rows(*cases: Case) -> pytest.MarkDecorator:
    """A test for each of these rows."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def rows_and_backends(*cases: Case) -> pytest.MarkDecorator:
    """For what is torch.optim.Optimizer's rather than a rule's: each row eagerly, some on the other backends too."""
    return pytest.mark.parametrize(
        ("case", "backend"),
        [
            pytest.param(case, *backend.values, marks=backend.marks, id=f"{case.name}-{backend.values[0]}")
            for case in cases
            for backend in BACKENDS
            if backend.values[0] == "eager" or case.on_every_backend
        ],
    )


def kind(case: Case) -> tuple[Any, ...]:
    """What the code around a rule can tell of an optimizer: two rows that are alike in it take the same ways there."""
    ours = case.ours
    optimizer = ours(case.parameters(), **case.settings, backend="eager")
    return (
        (case.matrices, case.sparse, case.complex),
        (case.counts_steps, bool(optimizer.first_scalar_states(optimizer.param_groups[0]))),
        (ours.prologue is not Update.prologue, bool(optimizer.variant(optimizer.param_groups[0]).state_names)),
        (ours.factors is not Update.factors, ours.total is not Update.total, bool(ours.kept_states)),
        ours.sparse_gradients is not Update.sparse_gradients,
        # States at once, and not of zeros.
        (bool(optimizer.state), any(state.start != 0.0 for state in ours.declared.values())),
    )


def of_each_kind(cases: Iterable[Case]) -> list[Case]:
    """A row of each kind: for what is not a rule's, and hence the same for all rows of a kind."""
    first = {kind(case): case for case in reversed([*cases])}
    first |= {kind(case): case for case in cases if case.on_every_backend}
    return [case for case in cases if case in first.values()]


# What a parameter without a gradient becomes in a step of one that sums over the model is told in test_distance.py.
KINDS = of_each_kind([case for case in CASES if case.ours.total is Update.total])

# For parametrize(*OPTIONS_OF_KINDS): every option set of a row of each kind. What takes seconds runs representatives.
OPTIONS_OF_KINDS = (
    ("case", "options", "backend"),
    [
        pytest.param(case, options, *backend.values, marks=backend.marks, id=f"{backend.values[0]}-{case.name}-{name}")
        for case in KINDS
        for name, options in case.variants.items()
        for backend in BACKENDS
        if case.on_every_backend or backend.values[0] in ("eager", "cpp")
    ],
)

each_case = rows(*CASES)
each_case_and_backend = rows_and_backends(*CASES)
each_kind = rows(*KINDS)
each_kind_and_backend = rows_and_backends(*KINDS)
