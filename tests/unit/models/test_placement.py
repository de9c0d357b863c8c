"""Parameters that are whole in a process: read, kept, put back, and their gradients clipped. And that whoever reads
values asks for whole ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align.models.adapters import add_lora
from align.models.load import load_encoder, load_policy
from align.models.placement import WHOLE, Placement, device_of, parameters_of, size_of
from align.models.save import save_policy
from align.models.scalar.heads import ScalarModel, ScoreStats, save_scalar
from align.recipe.schema import Lora, Model
from align.rollout.sync import policy_weights
from align.training.reference_logprobs import weights_digest
from tests.support.saved import LORA, save_tiny
from tests.support.tiny import tiny


def test_what_is_kept_is_put_back() -> None:
    """Every parameter is there by its name, detached, and a copy of the state restores it."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert WHOLE.wrap(model) is model
    named = dict(model.named_parameters())
    found = dict(WHOLE.full_parameters(model))
    assert found.keys() == named.keys() and not any(tensor.requires_grad for tensor in found.values())
    state = WHOLE.full_state(model)
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


def test_what_is_known_of_parameters_without_their_values() -> None:
    """A parameter that two modules share counts once."""
    model = tiny("llama")
    named = parameters_of(model)
    assert "lm_head.weight" not in named and model.lm_head.weight is named["model.embed_tokens.weight"]
    assert size_of(model) == sum(parameter.numel() for parameter in named.values())
    assert device_of(model) == torch.device("cpu")


def whole_copy(self: Placement, module: Any) -> Any:
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        parameter.data /= 2
    return twin


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A placement under which a parameter that lies in a module is twice the whole one. Halving is exact, so whoever
    asks gets the very bytes, and whoever does not gets others."""
    monkeypatch.setattr(Placement, "whole", lambda self, tensor: tensor.detach() / 2)
    monkeypatch.setattr(Placement, "whole_copy", whole_copy)


def place(model: nn.Module) -> nn.Module:
    """The same model under the placement of :func:`doubled`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def policies(folder: Path) -> tuple[Model, dict[str, nn.Module]]:
    """A policy whose weights are all trained, one with an adapter, and one with an adapter on top of another."""
    base = save_tiny(folder / "base")
    first = _random_adapter(add_lora(load_policy(base), Lora(rank=2, target_modules=["q_proj", "down_proj"])))
    save_policy(first, load_encoder(base), folder / "first", base=base)
    second = _random_adapter(add_lora(load_policy(Model(path=str(folder / "first"))), LORA))
    return base, {"full": load_policy(base), "lora": first, "two": second}


def _random_adapter(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def saved(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["full", "lora", "two"])
def test_what_is_sent_digested_and_saved_is_whole(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base, models = policies(tmp_path)
    encoder, policy = load_encoder(base), models[kind]
    sent, digest = dict(policy_weights(policy)), weights_digest(policy)
    save_policy(policy, encoder, tmp_path / "out", base=base)
    scalar = ScalarModel(load_policy(base).model)
    save_scalar(scalar, encoder, tmp_path / "scalar", base=base, scores=ScoreStats(0.0, 1.0, 2))
    request.getfixturevalue("doubled")
    placed = place(policy)
    assert same(dict(policy_weights(placed)), sent)
    assert weights_digest(placed) == digest != weights_digest(policy)
    save_policy(placed, encoder, tmp_path / "out again", base=base)
    assert saved(tmp_path / "out again") == saved(tmp_path / "out") != {}
    save_scalar(place(scalar), encoder, tmp_path / "scalar again", base=base, scores=ScoreStats(0.0, 1.0, 2))
    assert len(saved(tmp_path / "scalar")) == 2 and saved(tmp_path / "scalar again") == saved(tmp_path / "scalar")
