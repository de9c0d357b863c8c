"""Loading policies, tokenizers and encoders: what is refused and how it is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForSequenceClassification

from align.errors import InputError
from align.models.adapters import add_lora
from align.models.compute.dropout import disable_dropout
from align.models.files.identity import model_digest
from align.models.load import load_encoder, load_policy, load_tokenizer
from align.recipe.schema import Model
from tests.support.saved import LORA, adapter_on, edit, rows, save_tiny
from tests.support.tiny import CONFIGS, tiny
from tests.support.tokenizers import chatml, template

IDS = torch.arange(3, 13)[None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with a ChatML tokenizer."""
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


# What works


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "glm4"])
def test_a_folder_gives_its_model(family: str, tmp_path: Path) -> None:
    """The logits are those of the model that was saved, in fp32, ready to train."""
    model = save_tiny(tmp_path, family)
    policy = load_policy(model)
    expected = tiny(family, vocab_size=rows(chatml()), eos_token_id=2, bos_token_id=1)
    assert_close(policy(IDS).logits, expected(IDS).logits, atol=0, rtol=0)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in policy.parameters())


def test_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    """Fp32 by default, also when the file holds bf16; a checkpoint's own dtype never decides."""
    tiny("llama", vocab_size=rows(chatml())).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_policy(Model(path=str(tmp_path))).dtype == torch.float32
    assert load_policy(Model(path=str(tmp_path)), dtype="bf16").dtype == torch.bfloat16


def test_a_sharded_folder(tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=rows(chatml()))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_close(load_policy(Model(path=str(tmp_path)))(IDS).logits, model(IDS).logits, atol=0, rtol=0)


def test_encoder_uses_the_models_template_and_settings(folder: Path) -> None:
    encoder = load_encoder(Model(path=str(folder)))
    assert encoder.template == template("chatml")
    assert encoder.stop_ids == (chatml().eos_token_id,)


def test_a_template_of_ones_own(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant: "
    )
    model = Model(path=str(folder), chat_template=str(own))
    assert load_tokenizer(model).chat_template == own.read_text()
    assert load_encoder(model).template == own.read_text()
    with pytest.raises(
        InputError, match=r"none.jinja model.chat_template: cannot read the chat template: No such file"
    ):
        load_tokenizer(Model(path=str(folder), chat_template=str(tmp_path / "none.jinja")))


def test_dropout_is_off(tmp_path: Path) -> None:
    """Two passes in training mode are bit-equal, on a model whose configuration asks for dropout everywhere."""
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    policy = load_policy(save_tiny(tmp_path, "gpt2", **rates)).train()
    assert_close(policy(IDS).logits, policy(IDS).logits, atol=0, rtol=0)
    assert all(getattr(policy.config, name) == 0.0 for name in rates)


@pytest.mark.parametrize("family", ["llama", "glm", "phi", "gpt2"])
def test_disable_dropout(family: str) -> None:
    """In modules (nn.Dropout, and rates kept as attributes by attention) and in the configuration."""
    rates = {name: 0.5 for name in (*CONFIGS[family][1], "attention_dropout") if name.endswith(("dropout", "pdrop"))}
    model = tiny(family, **rates).train()
    assert (model(IDS).logits - model(IDS).logits).abs().max() > 0
    disable_dropout(model)
    assert_close(model(IDS).logits, model(IDS).logits, atol=0, rtol=0)
    assert all(getattr(model.config, name) == 0.0 for name in rates if hasattr(model.config, name))


# What is missing or wrong


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", r"model: no config.json, so this is not a model \(found: .*model.safetensors"),
        ("model.safetensors", r"model: no weights: expected model.safetensors"),
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str, says: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=says):
        load_policy(Model(path=str(folder)))


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"model: no tokenizer: expected tokenizer.json"):
        load_tokenizer(Model(path=str(folder)))


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(InputError) as caught:
        load_policy(Model(path=str(tmp_path)))
    assert [p.file for p in caught.value.problems] == [str(path) for path in gone]
    assert "missing, though model.safetensors.index.json lists it" in str(caught.value)


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    """An index must not make the loader read another file of the machine."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(InputError, match="leads out of the folder"):
        load_policy(Model(path=str(folder)))


def test_a_tensor_that_is_missing_is_not_made_up(folder: Path) -> None:
    """Transformers would fill it with random numbers and warn."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model: the weights lack 1 tensors, such as model.layers.1.mlp.up_proj.weight"
    ):
        load_policy(Model(path=str(folder)))


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_cut_off_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model: cannot be loaded: "):
        load_policy(Model(path=str(folder)))


def test_weights_of_another_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)
    with pytest.raises(InputError, match="model: cannot be loaded: "):
        load_policy(Model(path=str(folder)))


@pytest.mark.parametrize("text", ["{", "[]", '"config"', "\x00"])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json: damaged"):
        load_policy(Model(path=str(folder)))


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="model: cannot be loaded: "):
        load_tokenizer(Model(path=str(folder)))


def test_an_architecture_nobody_knows(folder: Path) -> None:
    edit(folder / "config.json", model_type="zorp", architectures=["ZorpForCausalLM"])
    with pytest.raises(InputError, match=r"model: cannot be loaded: .*zorp"):
        load_policy(Model(path=str(folder)))


def test_not_a_language_model(folder: Path) -> None:
    edit(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    with pytest.raises(InputError, match="a vit model is no causal language model"):
        load_policy(Model(path=str(folder)))


def test_a_reward_model_is_no_policy(tmp_path: Path) -> None:
    """The language model inside would load without complaint, with a random head."""
    config = LlamaConfig(**{**CONFIGS["llama"][1], "pad_token_id": 0, "num_labels": 1})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(
        InputError,
        match=r"LlamaForSequenceClassification is a classifier or reward model, a language model is wanted here",
    ):
        load_policy(Model(path=str(tmp_path)))


def test_quantised_weights_cannot_be_trained(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"the weights are quantised \(gptq\), which cannot be trained"):
        load_policy(Model(path=str(folder)))


@pytest.mark.parametrize(
    ("name", "says"), [("none/such", "no such file or folder"), ("note.txt", "expected a folder or a .gguf file")]
)
def test_not_a_model(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(InputError, match=f"{name}: .*{says}"):
        load_policy(Model(path=str(tmp_path / name)))


def test_a_folder_with_spaces_and_other_letters(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "mein Modell – 模型")
    assert load_policy(model).config.model_type == "llama"
    assert load_encoder(model).stop_ids


def test_tokenizer_with_ids_beyond_the_model(folder: Path) -> None:
    """Such an id would crash in the middle of training; the reverse, more rows than ids, is normal."""
    edit(folder / "config.json", vocab_size=300)
    highest = len(chatml()) - 1
    with pytest.raises(
        InputError, match=rf"the tokenizer has token {highest} \('<\|note\|>'\), the model only 300 embeddings; resize"
    ):
        load_tokenizer(Model(path=str(folder)))


# Adapters


def test_an_adapter_brings_its_base(folder: Path) -> None:
    adapter = adapter_on(folder)
    policy = load_policy(Model(path=str(adapter)))
    assert_close(policy(IDS).logits, load_policy(Model(path=str(folder)))(IDS).logits, atol=0, rtol=0)  # B is zero
    assert not any(p.requires_grad for p in policy.parameters())


def test_another_base_is_refused(folder: Path) -> None:
    """The same shapes, other weights."""
    adapter = adapter_on(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError,
        match=r"align.json: .*model is not the model that the adapter was trained on \(digest \w{12}, expected",
    ):
        load_policy(Model(path=str(adapter)))


def test_a_base_that_is_gone(folder: Path) -> None:
    adapter = adapter_on(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"align.json: the adapter's base is gone: .*model"):
        load_policy(Model(path=str(adapter)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "a IA3 adapter; only LORA is supported"),
        ({"task_type": "SEQ_CLS"}, "an adapter for SEQ_CLS, a language model's is wanted here"),
    ],
)
def test_adapters_of_other_kinds(folder: Path, changes: dict[str, str], says: str) -> None:
    adapter = adapter_on(folder)
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=f"adapter_config.json: {says}"):
        load_policy(Model(path=str(adapter)))


def test_an_adapter_without_a_base(folder: Path) -> None:
    adapter = adapter_on(folder)
    (adapter / "align.json").unlink()
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match="an adapter without a base"):
        load_policy(Model(path=str(adapter)))


def test_an_adapter_of_another_tool(folder: Path) -> None:
    """PEFT's own folder has no tokenizer and no digest: base and tokenizer are found by the name it keeps."""
    base = Model(path=str(folder))
    add_lora(load_policy(base), LORA).save_pretrained(folder.parent / "peft")
    other = Model(path=str(folder.parent / "peft"))
    assert_close(load_policy(other)(IDS).logits, load_policy(base)(IDS).logits, atol=0, rtol=0)
    assert load_encoder(other).digest == load_encoder(base).digest


def test_incomplete_adapter_weights(folder: Path) -> None:
    """PEFT only warns, and trains on from a random A."""
    adapter = adapter_on(folder)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    del weights[name]
    save_file(weights, path)
    with pytest.raises(InputError, match=r"adapter_model.safetensors: no weights for .*lora_A"):
        load_policy(Model(path=str(adapter)))


# Identity


def test_digest_follows_content_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = model_digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "README.md").write_text("hello")
    os.utime(folder / "model.safetensors")
    assert model_digest(folder) == model_digest(str(folder)) == model_digest(tmp_path / "copy") == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    stat = (folder / "model.safetensors").stat()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    os.utime(folder / "model.safetensors", (stat.st_atime, stat.st_mtime))  # Content decides, not the time
    assert model_digest(folder) != before
    edit(tmp_path / "copy" / "config.json", rms_norm_eps=1e-3)
    assert model_digest(tmp_path / "copy") != before


def test_digest_of_an_adapter_is_its_own_and_its_bases(folder: Path) -> None:
    adapter = adapter_on(folder)
    before = model_digest(adapter)
    edit(adapter / "adapter_config.json", base_model_name_or_path="moved/elsewhere")
    assert model_digest(adapter) == before
    base = json.loads((adapter / "align.json").read_text())["base"]
    edit(adapter / "align.json", base=base | {"digest": "0" * 64})
    assert model_digest(adapter) != before


def test_digest_of_hub_models() -> None:
    assert model_digest("some/model") == "hub:some/model@main"
    assert model_digest("some/model", COMMIT) == f"hub:some/model@{COMMIT}"
