"""`align merge`: one plain model from an adapter, proved, all at once or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.commands.merge import merge
from align.errors import InputError
from align.models.adapters import add_lora
from align.models.load import load_encoder, load_policy, load_tokenizer, without_lm_head
from align.models.save import save_policy
from align.models.scalar.heads import ScalarModel, ScoreStats, load_scalar, save_scalar
from align.recipe.schema import Model
from tests.support.saved import LORA, edit, save_tiny
from tests.support.tiny import tiny

IDS = torch.arange(3, 23).reshape(2, 10)


def moved(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = save_tiny(tmp_path / "base")
    policy = moved(add_lora(load_policy(base), LORA))
    save_policy(policy, load_encoder(base), tmp_path / "adapter", base=base)
    return tmp_path / "adapter"


def test_a_merged_adapter_is_a_plain_model_of_its_own(adapter: Path, tmp_path: Path) -> None:
    made = merge(str(adapter), tmp_path / "runs", tmp_path / "out")
    assert made.dtype == "fp32" and "20 of 20 greedy answers are equal" in made.difference
    expected = load_policy(Model(path=str(adapter)))(IDS).logits
    out = Model(path=str(tmp_path / "out"))
    assert_close(load_policy(out)(IDS).logits, expected, atol=3e-5, rtol=1e-5)
    assert_close(AutoModelForCausalLM.from_pretrained(out.path)(IDS).logits, expected, atol=3e-5, rtol=1e-5)
    assert load_encoder(out).digest == load_encoder(Model(path=str(adapter))).digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"], "nothing else is left"


def test_the_bases_own_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    tiny("llama", vocab_size=load_policy(base).config.vocab_size).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    save_policy(moved(add_lora(load_policy(base), LORA)), load_encoder(base), tmp_path / "adapter", base=base)
    assert merge(str(tmp_path / "adapter"), tmp_path, tmp_path / "same").dtype == "bf16"
    assert merge(str(tmp_path / "adapter"), tmp_path, tmp_path / "wide", dtype="fp32").dtype == "fp32"
    assert [json.loads((tmp_path / name / "config.json").read_text())["dtype"] for name in ("same", "wide")] == [
        "bfloat16",
        "float32",
    ]


def test_a_reward_models_adapter(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    encoder = load_encoder(base)
    scalar = ScalarModel(moved(add_lora(without_lm_head(load_policy(base)), LORA)))
    save_scalar(scalar, encoder, tmp_path / "adapter", base=base, scores=ScoreStats(0.5, 2.0, 8))
    merge(str(tmp_path / "adapter"), tmp_path, tmp_path / "out")
    one, other = (load_scalar(Model(path=str(tmp_path / name))) for name in ("adapter", "out"))
    assert torch.equal(one.head.weight, other.head.weight)
    assert_close(other.backbone(IDS).last_hidden_state, one.backbone(IDS).last_hidden_state, atol=3e-5, rtol=1e-5)


def test_an_adapter_without_chat_template_is_merged_all_the_same(adapter: Path, tmp_path: Path) -> None:
    for path in adapter.glob("*.jinja"):
        path.unlink()
    edit(adapter / "tokenizer_config.json", chat_template=None)
    made = merge(str(adapter), tmp_path, tmp_path / "out")
    assert not made.template and "roundings" in made.difference
    expected = load_policy(Model(path=str(adapter)))(IDS).logits
    assert_close(load_policy(Model(path=str(tmp_path / "out")))(IDS).logits, expected, atol=3e-5, rtol=1e-5)
    assert load_tokenizer(Model(path=str(tmp_path / "out"))).chat_template is None


@pytest.mark.parametrize(
    ("source", "out", "says"),
    [
        ("base", "out", "base: no adapter: it is a whole model already"),
        ("adapter", "base", "base: exists already; name a new folder with --out"),
        ("adapter", "none/out", "there is no folder .*none"),
        ("nothing", "out", "nothing"),
    ],
)
def test_what_is_refused(adapter: Path, tmp_path: Path, source: str, out: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        merge(str(tmp_path / source), tmp_path / "runs", tmp_path / out)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_merge_that_fails(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr("align.models.save.save_tokenizer", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        merge(str(adapter), tmp_path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
