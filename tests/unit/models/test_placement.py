"""Parameters that are whole in a process: read, kept, put back, and their gradients clipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from align.models.placement import WHOLE


def test_what_is_kept_is_put_back() -> None:
    """Every parameter is there by its name, detached, and a copy of the state restores it."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert WHOLE.wrap(model) is model
    named = dict(model.named_parameters())
    found = dict(WHOLE.full_parameters(model))
    assert found.keys() == named.keys() and not any(tensor.requires_grad for tensor in found.values())
    state = WHOLE.state(model.state_dict())
    assert state.keys() == model.state_dict().keys() > named.keys(), "buffers are part of a model's state"
    kept = {name: tensor.clone() for name, tensor in WHOLE.state(named).items()}
    with torch.no_grad():
        for parameter in named.values():
            parameter.add_(1.0)
    WHOLE.load(named, kept)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in named.items())


@pytest.mark.parametrize(("max_norm", "scale"), [(None, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_each_group_is_clipped_by_its_own_norm(max_norm: float | None, scale: float) -> None:
    """A parameter without gradient counts as nothing."""
    one, two, three = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad, two.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    groups = {"one": [one, three], "two": [two]}
    norms = WHOLE.reduce_and_clip({"a": one, "b": two, "c": three}, groups, max_norm)
    assert norms == {"one": 5.0, "two": 0.5}
    torch.testing.assert_close(one.grad, scale * torch.tensor([3.0, 4.0]), rtol=1e-5, atol=0)
    assert two.grad.tolist() == [0.0, 0.5] and three.grad is None
