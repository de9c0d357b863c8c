"""Code and pickles in a model folder are never run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.errors import InputError
from align.models.load import load_encoder, load_policy
from align.recipe.schema import Model
from tests.support.saved import CANARY, adapter_on, edit, save_tiny, trap


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with a ChatML tokenizer."""
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a model folder's own code would write."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    return path


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_model_code_is_never_run(folder: Path, canary: Path, model_type: str) -> None:
    """A class of the folder's own is refused; where transformers has the class, its own is used, and the folder's
    code is not run."""
    trap(folder)
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    edit(folder / "config.json", model_type=model_type, auto_map=auto_map)
    if model_type == "evil":
        with pytest.raises(
            InputError, match=r"config.json: wants its own Python code to be run, which align never does \(auto_map\)"
        ):
            load_policy(Model(path=str(folder)))
    else:
        assert type(load_policy(Model(path=str(folder)))).__module__ == "transformers.models.llama.modeling_llama"
    assert not canary.exists()


@pytest.mark.parametrize("tokenizer_class", ["EvilTokenizer", None, "PreTrainedTokenizerFast"])
def test_tokenizer_code_is_never_run(folder: Path, canary: Path, tokenizer_class: str | None) -> None:
    """The same for tokenizers, whose class may also be missing from the settings."""
    trap(folder)
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class, auto_map=auto_map)
    if tokenizer_class == "PreTrainedTokenizerFast":
        load_encoder(Model(path=str(folder)))
    else:
        with pytest.raises(InputError, match=r"tokenizer_config.json: wants its own Python code to be run"):
            load_encoder(Model(path=str(folder)))
    assert not canary.exists()


class Bomb:
    """Pickles to a call that writes the canary."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (CANARY,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(folder: Path, canary: Path, name: str) -> None:
    torch.save({"model.norm.weight": Bomb()}, folder / name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"{name}: refused: weights in pickle .* convert it to model.safetensors"):
        load_policy(Model(path=str(folder)))
    assert not canary.exists()


def test_pickles_beside_safetensors_are_not_opened(folder: Path, canary: Path) -> None:
    """Every file name that some tool loads as a pickle, lying beside good weights."""
    for name in (
        "pytorch_model.bin",
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
    ):
        torch.save(Bomb(), folder / name)
    load_policy(Model(path=str(folder)))
    load_encoder(Model(path=str(folder)))
    assert not canary.exists()


def test_a_pickled_adapter_is_refused(folder: Path, canary: Path) -> None:
    """PEFT falls back to adapter_model.bin."""
    adapter = adapter_on(folder)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin: refused: weights in pickle"):
        load_policy(Model(path=str(adapter)))
    assert not canary.exists()
