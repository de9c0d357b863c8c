"""What a checkpoint holds and its model takes: each class's own attention, nothing lost or damaged in silence, the
configuration kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM
from transformers import models as hf

from align.errors import InputError
from align.models import intake
from align.models.adapters import adapted, add_lora, lora_layers
from align.models.canary import require_own_logprobs
from align.models.compute.dropout import input_config
from align.models.load import load_encoder, load_policy, without_lm_head
from align.models.merging import merged_copy
from align.models.save import save_policy
from align.recipe.schema import Model
from tests.support.saved import LORA, edit, rows, save_tiny
from tests.support.tiny import CONFIGS, tiny
from tests.support.tokenizers import chatml

IDS = torch.arange(3, 23)[None]
TEXT: dict[str, Any] = {
    "vocab_size": rows(chatml()),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    intake._told.clear()


# Attention


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "mistral_long_window"])
def test_a_model_is_loaded_with_an_attention_that_its_class_has(family: str, tmp_path: Path) -> None:
    """And gives transformers' own logits, and log-probs by our road where it is one that keeps conversations apart."""
    model = save_tiny(tmp_path, family)
    policy = load_policy(model)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")(IDS, use_cache=False).logits
    assert_close(policy(IDS, use_cache=False).logits, expected, atol=2e-5, rtol=1e-5)
    assert policy.config._attn_implementation == ("eager" if family in ("sinks", "bloom", "gptj", "capped") else "sdpa")
    require_own_logprobs(policy, list(range(3, 15)), "padded")


def llama4(folder: Path) -> Model:
    settings = {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 64,
    }
    config = hf.Llama4TextConfig(**TEXT, **settings, interleave_moe_layer_step=1, pad_token_id=0)
    hf.Llama4ForCausalLM(config).save_pretrained(folder)
    chatml().save_pretrained(folder)
    return Model(path=str(folder))


def test_a_class_that_names_its_transformer_wrongly(tmp_path: Path) -> None:
    """Llama 4's text model says `language_model` and has `model`."""
    policy = load_policy(llama4(tmp_path))
    for layout in ("tree", "padded"):
        require_own_logprobs(policy, list(range(3, 15)), layout)  # type: ignore[arg-type]
    assert "router" not in adapted(add_lora(policy, LORA)), "it returns more than a product"


# Parts of a checkpoint


def gemma3(folder: Path) -> Model:
    tokens = {"image_token_index": 400, "boi_token_index": 401, "eoi_token_index": 402}
    text = {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    chatml().save_pretrained(folder)
    return Model(path=str(folder))


def test_a_vision_tower_gets_no_adapters_and_is_saved(tmp_path: Path) -> None:
    model = gemma3(tmp_path / "model")
    tuned = add_lora(load_policy(model), LORA)
    assert len(lora_layers(tuned)) == 14 and not any("vision" in name for name in lora_layers(tuned))
    assert "none on what is outside model.language_model, such as a vision tower (" in adapted(tuned)
    policy = load_policy(model)
    save_policy(policy, load_encoder(model), tmp_path / "out", base=model)
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(load_file(tmp_path / "model/model.safetensors"))


def test_an_adapter_of_the_text_part_is_saved_and_loaded(tmp_path: Path) -> None:
    model = gemma3(tmp_path / "model")
    tuned = add_lora(load_policy(model), LORA)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_policy(tuned, load_encoder(model), tmp_path / "out", base=model)
    expected = tuned(IDS, use_cache=False).logits
    assert_close(
        load_policy(Model(path=str(tmp_path / "out")))(IDS, use_cache=False).logits, expected, atol=1e-6, rtol=0
    )
    assert_close(merged_copy(tuned)(IDS, use_cache=False).logits, expected, atol=3e-5, rtol=1e-5)


def test_what_a_text_model_leaves_out_is_said_once_and_in_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer for several tokens at once, a tower: transformers' text classes pass over them without a word."""
    model = save_tiny(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    extra = {
        "mtp.layers.0.weight": torch.zeros(3, 4),
        "visual.blocks.0.q": torch.zeros(5),
        "visual.blocks.1.q": torch.zeros(5),
    }
    save_file(
        {**load_file(path), **extra, "model.rotary_emb.inv_freq": torch.zeros(2)}, path, metadata={"format": "pt"}
    )
    with caplog.at_level(logging.WARNING, logger="align"):
        policies = [load_policy(model), load_policy(model)]
    line = (
        "LlamaForCausalLM does not use mtp.layers.0 (1 tensor, 12 parameters), visual.blocks (2 tensors, 10 parameters)"
    )
    assert caplog.text.count(line) == 1 and "these are neither trained nor saved" in caplog.text
    assert save_policy(policies[1], load_encoder(model), tmp_path / "out", base=model)["left_out"].startswith(line)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_no_number_is_named(name: str, value: float, tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[1] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"1 of [\d,]+ numbers of {name} are NaN or infinite"):
        load_policy(model)


def test_large_finite_weights_are_no_fault(tmp_path: Path) -> None:
    """Their sum is not finite, each of them is."""
    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, 3e38)
    intake.require_finite(model, "file")


def test_a_head_of_its_own_where_the_configuration_says_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights are right; what is saved says so, or every other program would tie them."""
    model = save_tiny(tmp_path / "model", tie_word_embeddings=False)
    expected = load_policy(model)(IDS).logits
    edit(tmp_path / "model/config.json", tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING, logger="align"):
        policy = load_policy(model)
    assert "the weights hold another head" in caplog.text
    save_policy(policy, load_encoder(model), tmp_path / "out", base=model)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    for found in (
        policy,
        load_policy(Model(path=str(tmp_path / "out"))),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    ):
        assert_close(found(IDS).logits, expected, atol=1e-6, rtol=0)


# The configuration


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1}),
        ("llama", {"attention_dropout": 0.1}),
        ("phi", {"resid_pdrop": 0.2}),
    ],
)
def test_dropout_rates_are_kept_in_what_is_saved(family: str, rates: dict[str, float], tmp_path: Path) -> None:
    """Off while a model is here; the saved configuration says what the loaded one said: whole, merged, and without its
    head."""
    model = save_tiny(tmp_path / "model", family, **rates)
    policy = load_policy(model)
    assert all(getattr(policy.config, name) == 0.0 for name in rates)
    tuned = add_lora(load_policy(model), LORA)
    for place, what in (("whole", policy), ("adapter", tuned)):
        save_policy(what, load_encoder(model), tmp_path / place, base=model, save_merged=place == "adapter")
    for place in ("whole", "adapter/merged"):
        saved = json.loads((tmp_path / place / "config.json").read_text())
        assert {name: saved[name] for name in rates} == rates
    backbone = without_lm_head(load_policy(model))
    assert {name: getattr(input_config(backbone), name) for name in rates} == rates
    assert tiny("llama").config.attention_dropout == 0.0
