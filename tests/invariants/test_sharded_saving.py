"""What leaves processes that each hold a part of the model is what leaves one that holds it whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from align.models.adapters import add_lora
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.training.launch import respawn
from tests.support.saved import LORA, save_tiny
from tests.support.sharded_saving import SAVED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    base = save_tiny(root / "loaded", initializer_range=0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_policy(add_lora(load_policy(base), LORA), load_encoder(base), root / "adapter", base=base)
    code = f"from pathlib import Path\nfrom tests.support.sharded_saving import saved_side_by_side\nsaved_side_by_side(Path({str(root)!r}))"
    assert respawn(2, [sys.executable, "-c", code]) == 0
    return root


def tensors(folder: Path) -> dict[str, Tensor]:
    """Of all files; no tensor is in two of them."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        loaded = load_file(path)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


@pytest.mark.parametrize("name", SAVED)
def test_a_model_in_parts_is_saved_as_a_whole_one(folder: Path, name: str) -> None:
    """The same tensors to the last bit, and the same other files."""
    whole, parts = folder / f"{name}-whole", folder / f"{name}-parts"
    wanted, found = tensors(whole), tensors(parts)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)

    def other_files(at: Path) -> dict[str, Any]:
        kept = [path for path in at.iterdir() if path.suffix != ".safetensors" and "index" not in path.name]
        return {path.name: path.read_text().replace(str(at), "") for path in kept}

    assert other_files(parts) == other_files(whole)


@pytest.mark.parametrize("name", ["tied", "untied", "experts", "loaded", "reward"])
def test_files_have_a_bounded_size_and_an_index(folder: Path, name: str) -> None:
    """As transformers reads them: no file is above the bound, unless it is one tensor, and all can be found."""
    parts = folder / f"{name}-parts"
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    paths = sorted(parts.glob("model-*.safetensors"))
    assert len(paths) > 2 and {path.name for path in paths} == set(index["weight_map"].values())
    for number, path in enumerate(paths):
        assert path.name == f"model-{number + 1:05d}-of-{len(paths):05d}.safetensors"
        held = load_file(path)
        assert all(index["weight_map"][key] == path.name for key in held)
        assert sum(tensor.nbytes for tensor in held.values()) <= 10_000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(load_file(p)[k].nbytes for p in paths for k in load_file(p))


def test_it_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the package's own strict loader."""
    monkeypatch.chdir(folder)
    from align.recipe.schema import Model

    one, other = (load_policy(Model(path=f"loaded-{how}")) for how in ("whole", "parts"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_answers_of_a_model_in_parts(folder: Path) -> None:
    """Made by all processes together, or by each by itself once it has gathered the model: those of a whole one."""
    answers = json.loads((folder / "answers.json").read_text())
    assert answers["parts"] == answers["gathered"] == answers["whole"]
    assert len({len(ids) for ids in answers["whole"]}) >= 1 and any(answers["whole"])
