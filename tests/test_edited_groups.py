"""Parameter groups and states that a user edits between two steps: the next step is torch's, on every backend."""

from typing import Any

import edits
import pytest
import torch
from edits import GROUPS, STATES, TWICE, assert_as_torch, trained

import triton_optim

# Who sees an edit is the same code for all backends: where a step takes long, some are enough.
SOME = [edits.move_to_the_next_group, edits.replace, edits.take_the_last_group, edits.another_moment]
each_edit = pytest.mark.parametrize("edit", GROUPS, ids=lambda edit: edit.__name__)


@pytest.mark.parametrize("edit", [*GROUPS, *STATES], ids=lambda edit: edit.__name__)
def test_the_next_step_sees_the_edit(edit: Any, backend: str, device: torch.device) -> None:
    if backend in ("compiled", "triton") and edit not in SOME:
        pytest.skip("the others are tried on the faster backends")
    ours = trained(triton_optim.AdamW, edit, device, backend=backend)
    assert_as_torch(ours, trained(torch.optim.AdamW, edit, device, foreach=False))


@each_edit
def test_the_next_step_of_matrices_sees_the_edit(edit: Any, device: torch.device) -> None:
    ours = trained(triton_optim.Muon, edit, device, backend="eager")
    assert_as_torch(ours, trained(torch.optim.Muon, edit, device))


@pytest.mark.parametrize("edit", TWICE, ids=lambda edit: edit.__name__)
def test_a_parameter_that_is_listed_twice_is_stepped_twice(edit: Any, device: torch.device) -> None:
    ours = trained(triton_optim.AdamW, edit, device)
    assert_as_torch(ours, trained(torch.optim.AdamW, edit, device, foreach=False))


# What a group may choose of its states: an edit that needs others, and what the next step does about it.
CHOICES = {
    "Adafactor, moments begin": (triton_optim.AdafactorRelative, {"beta1": None}, {"beta1": 0.9}, "exp_avg"),
    "SOAP, another side": (triton_optim.SOAP, {"max_precond_dim": 4}, {"max_precond_dim": 6}, "Q_R"),
    "SOAP, a side less": (triton_optim.SOAP, {"max_precond_dim": 6}, {"max_precond_dim": 4}, None),
    "Prodigy, other samples": (triton_optim.Prodigy, {"slice_p": 3}, {"slice_p": 2}, None),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_of_states_that_is_edited(choice: str) -> None:
    """The states are made, or those that are there are refused before anything changes."""
    kind, before, after, made = CHOICES[choice]
    p = torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
    opt = kind([p], **before, backend="eager")
    for _ in range(3):
        p.grad = p.detach().clone()
        opt.step()
    opt.param_groups[0] |= after
    value = p.detach().clone()
    if made is not None:
        opt.step()
        assert made in opt.state[p]
        assert not torch.equal(p, value)
        return
    with pytest.raises(
        RuntimeError, match=r"with the options of its group, .*the options that the state was made with"
    ):
        opt.step()
    assert torch.equal(p, value)
