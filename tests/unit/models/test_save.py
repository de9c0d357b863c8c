"""Saving policies: what another program finds in the folder."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from align.data.chat.encoder import Encoder
from align.errors import InputError
from align.models.adapters import add_lora, trainable_parameters
from align.models.files.identity import model_digest
from align.models.generate import answer
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.recipe.schema import Model
from tests.support.saved import LORA, QUESTION, edit, rows, save_tiny
from tests.support.tiny import tiny
from tests.support.tokenizers import build, chatml, glm4, llama3, template

IDS = torch.arange(3, 13)[None]


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def keys(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as weights:
        return set(weights.keys())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "glm4", "gpt2"])
def test_plain_transformers_loads_it(family: str, tied: bool, tmp_path: Path) -> None:
    """The same logits, tied or not (a tied head is stored once and stays tied), and the live model is left as it
    was."""
    base = save_tiny(tmp_path / "base", family, tie_word_embeddings=tied)
    policy, encoder = load_policy(base), load_encoder(base)
    policy.config.use_cache = False
    report = save_policy(policy, encoder, tmp_path / "out", base=base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_close(loaded(IDS).logits, policy(IDS).logits, atol=0, rtol=0)
    head = "lm_head.weight"
    assert (head in keys(tmp_path / "out" / "model.safetensors")) == (not tied)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.use_cache is True and policy.config.use_cache is False
    assert (report["format"], report["dtype"]) == ("full", "float32")


def test_bf16_is_saved_as_bf16(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_policy(load_policy(base, dtype="bf16"), load_encoder(base), tmp_path / "out", base=base)
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_nothing_of_training_leaks_into_the_configuration(tmp_path: Path) -> None:
    """Neither the attention function of training, which nobody else has, nor paths, nor flags of the hub's client."""
    base = save_tiny(tmp_path / "base")
    policy = load_policy(base, attn_implementation="align_tree")
    save_policy(policy, load_encoder(base), tmp_path / "out", base=base)
    text = (tmp_path / "out" / "config.json").read_text() + (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "align" not in text and str(tmp_path) not in text and "local_files_only" not in text
    assert policy.config._attn_implementation == "align_tree"


@pytest.mark.parametrize("make", [chatml, llama3, glm4])
def test_stop_ids_are_everywhere(make: Any, tmp_path: Path) -> None:
    """The base's generation_config names another end; after saving, every id that ends a turn is there, the base's
    own too."""
    tokenizer = make()
    other = 7
    base = save_tiny(tmp_path / "base", tokenizer=tokenizer, eos_token_id=other)
    encoder = load_encoder(base)
    report = save_policy(load_policy(base), encoder, tmp_path / "out", base=base)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [*encoder.stop_ids, other]
    assert generation.pad_token_id == encoder.pad_id
    config = read(tmp_path / "out" / "config.json")
    assert set(encoder.stop_ids) == set(
        config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    )
    assert config["pad_token_id"] == encoder.pad_id
    assert report["stop_ids"] == list(encoder.stop_ids)


@pytest.mark.parametrize("make", [chatml, llama3, glm4])
def test_the_tokenizer_comes_back_the_same(make: Any, tmp_path: Path) -> None:
    """The next stage computes the same encoder digest; plain transformers renders and encodes the same ids."""
    base = save_tiny(tmp_path / "base", tokenizer=make())
    encoder = load_encoder(base)
    save_policy(load_policy(base), encoder, tmp_path / "out", base=base)
    again = load_encoder(Model(path=str(tmp_path / "out")))
    assert (again.digest, again.stop_ids, again.pad_id) == (encoder.digest, encoder.stop_ids, encoder.pad_id)
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = plain.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert ids == encoder.encode_prompt(QUESTION).tolist()


def test_the_tokenizer_class_has_a_name_that_transformers_4_knows(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_policy(load_policy(base), load_encoder(base), tmp_path / "out", base=base)
    assert read(tmp_path / "out" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_template_of_training_is_saved(tmp_path: Path) -> None:
    """A template of the recipe replaces the model's own, and settings come along to the next stage."""
    base = save_tiny(tmp_path / "base")
    own = tmp_path / "own.jinja"
    own.write_text(template("chatml").replace("You are", "{{ greeting }} You are"))
    model = base.model_copy(update={"chat_template": str(own), "chat_template_kwargs": {"greeting": "Hi."}})
    encoder = load_encoder(model)
    save_policy(load_policy(model), encoder, tmp_path / "out", base=model)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own.read_text()
    assert load_encoder(Model(path=str(tmp_path / "out"))).digest == encoder.digest


@pytest.mark.parametrize("spelling", ["files", "list", "override"])
def test_all_templates_of_a_model_stay_with_it(tmp_path: Path, spelling: str) -> None:
    """A folder keeps what it had: ``tool_use`` beside the default, from files or in tokenizer_config.json as older
    folders have them."""
    base = save_tiny(tmp_path / "base")
    both = {"default": template("chatml"), "tool_use": template("qwen3"), "rag": "{{ bos_token }}"}
    (tmp_path / "base" / "chat_template.jinja").unlink()
    if spelling == "files":
        plain = AutoTokenizer.from_pretrained(tmp_path / "base")
        plain.chat_template = both
        plain.save_pretrained(tmp_path / "base")
        assert (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").is_file()
    else:
        edit(
            tmp_path / "base" / "tokenizer_config.json",
            chat_template=[{"name": k, "template": v} for k, v in both.items()],
        )
    model = base
    if spelling == "override":  # one template for all, as the recipe says
        (tmp_path / "own.jinja").write_text(both["default"])
        model = base.model_copy(update={"chat_template": str(tmp_path / "own.jinja")})
    encoder = load_encoder(model)
    save_policy(load_policy(model), encoder, tmp_path / "out", base=model)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert saved == (both["default"] if spelling == "override" else both)
    assert load_encoder(Model(path=str(tmp_path / "out"))).digest == encoder.digest


@pytest.mark.parametrize("asked", [None, "2026-11-30"])
def test_the_date_that_a_template_was_told_comes_along(tmp_path: Path, asked: str | None) -> None:
    """The template stays the model's own: whoever serves it has a clock. Here the date stays that of training."""
    base = save_tiny(tmp_path / "base")
    dated = "{{ strftime_now('%Y-%m-%d') }}" + template("chatml")
    (tmp_path / "base" / "chat_template.jinja").write_text(dated)
    model = base.model_copy(update={"chat_template_date": asked})
    encoder = load_encoder(model)
    save_policy(load_policy(model), encoder, tmp_path / "out", base=model)
    assert (
        read(tmp_path / "out" / "align.json")["chat_template_date"]
        == encoder.chat_template_date
        == (asked or "2024-07-26")
    )
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == dated
    again = load_encoder(Model(path=str(tmp_path / "out")))
    assert again.digest == encoder.digest and again.spell(again.encode_prompt(QUESTION)).startswith(
        asked or "2024-07-26"
    )


def test_sampling_flags_that_contradict_are_left_out(tmp_path: Path) -> None:
    """transformers refuses to save a greedy generation_config with a temperature, which it loads without complaint."""
    base = save_tiny(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1})
    )
    report = save_policy(load_policy(base), load_encoder(base), tmp_path / "out", base=base)
    assert report["generation_flags_left_out"] == ["temperature", "top_p"]
    saved = read(tmp_path / "out" / "generation_config.json")
    assert "temperature" not in saved and saved["repetition_penalty"] == 1.1


def test_sampling_flags_of_a_sampling_model_stay(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7]})
    )
    report = save_policy(load_policy(base), load_encoder(base), tmp_path / "out", base=base)
    saved = read(tmp_path / "out" / "generation_config.json")
    assert (saved["do_sample"], saved["temperature"], saved["eos_token_id"]) == (
        True,
        0.6,
        [chatml().eos_token_id, 2, 7],
    )
    assert report["generation_flags_left_out"] == []


def test_settings_that_nothing_can_save(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    policy = load_policy(base)
    policy.generation_config.num_return_sequences = 3  # greedy search has one
    report = save_policy(policy, load_encoder(base), tmp_path / "out", base=base)
    assert "num_return_sequences" in report["generation_flags_left_out"]
    assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [chatml().eos_token_id]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    """Safetensors writes 0600, which another user's server cannot read."""
    base = save_tiny(tmp_path / "base")
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / "out", base=base, save_merged=True)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_auto_map_does_not_travel(tmp_path: Path) -> None:
    """The saved folder has none of the files that auto_map names, and others would run them."""
    base = save_tiny(tmp_path / "base")
    config = read(tmp_path / "base" / "config.json") | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    settings = read(tmp_path / "base" / "tokenizer_config.json") | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    save_policy(load_policy(base), load_encoder(base), tmp_path / "out", base=base)
    assert '"auto_map"' not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_more_embeddings_than_ids(tmp_path: Path) -> None:
    """Padding rows of the embedding survive saving, and ids without a token are never sampled, however likely they
    are."""
    base = save_tiny(tmp_path / "base", tie_word_embeddings=False)
    policy, encoder = load_policy(base), load_encoder(base)
    with torch.no_grad():
        policy.lm_head.weight[len(chatml()) :] = 0
        policy.lm_head.weight[len(chatml()) :] += 50 * policy.lm_head.weight.norm(dim=1).max()
        policy.lm_head.weight[len(chatml()) :] *= policy.model(IDS).last_hidden_state[0, -1].sign()
    assert policy(IDS).logits[0, -1].argmax() >= len(chatml())
    save_policy(policy, encoder, tmp_path / "out", base=base)
    loaded = load_policy(Model(path=str(tmp_path / "out")))
    assert loaded.get_input_embeddings().weight.shape[0] == rows(chatml())
    for temperature in (0.0, 1.0):
        (ids,) = answer(loaded, encoder, [IDS[0].tolist()], max_new_tokens=8, temperature=temperature)
        assert max(ids) < len(chatml())


def test_fewer_embeddings_than_ids_is_an_error(tmp_path: Path) -> None:
    """A policy that its own tokenizer would crash must not be saved as one that works."""
    base = save_tiny(tmp_path / "base")
    longer = build(
        template("chatml"),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|{i}|>" for i in range(20))],
        eos="<|im_end|>",
    )
    with pytest.raises(InputError, match=r"the tokenizer has token \d+ .* the model only \d+ embeddings"):
        save_policy(load_policy(base), Encoder(longer), tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_token_that_was_added(tmp_path: Path) -> None:
    """One more token, LoRA, save, load: the same logits, for the new id too."""
    longer = build(
        template("chatml"),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|new|>"],
        bos="<|im_start|>",
        eos="<|im_end|>",
    )
    model = tiny("llama", vocab_size=len(longer) - 1)
    model.resize_token_embeddings(len(longer))
    model.save_pretrained(tmp_path / "base")
    longer.save_pretrained(tmp_path / "base")
    base = Model(path=str(tmp_path / "base"))
    policy = add_lora(load_policy(base), LORA)
    with torch.no_grad():
        for parameter in trainable_parameters(policy).values():
            parameter.normal_(std=0.1)
    save_policy(policy, load_encoder(base), tmp_path / "out", base=base)
    ids = torch.tensor([[3, len(longer) - 1, 5]])
    assert_close(load_policy(Model(path=str(tmp_path / "out")))(ids).logits, policy(ids).logits, atol=1e-6, rtol=0)


# Adapters


@pytest.fixture
def adapter(tmp_path: Path) -> dict[str, Any]:
    """A saved adapter with an effect, its merged model beside it, and the report."""
    base = save_tiny(tmp_path / "base")
    policy = add_lora(load_policy(base), LORA)
    with torch.no_grad():
        for parameter in trainable_parameters(policy).values():
            parameter.normal_(std=0.1)
    report = save_policy(policy, load_encoder(base), tmp_path / "out", base=base, save_merged=True)
    return {"policy": policy, "base": base, "out": tmp_path / "out", "report": report}


def test_an_adapter_loads_here_and_in_plain_transformers(adapter: dict[str, Any]) -> None:
    expected = adapter["policy"](IDS).logits
    assert_close(load_policy(Model(path=str(adapter["out"])))(IDS).logits, expected, atol=0, rtol=0)
    assert_close(AutoModelForCausalLM.from_pretrained(adapter["out"])(IDS).logits, expected, atol=0, rtol=0)
    assert (expected - load_policy(adapter["base"])(IDS).logits).abs().max() > 0.1


def test_an_adapter_keeps_the_identity_of_its_base(adapter: dict[str, Any]) -> None:
    notes = read(adapter["out"] / "align.json")
    path = adapter["base"].path
    assert notes["base"] == {"path": path, "revision": None, "digest": model_digest(path), "dequantised_from": None}
    assert notes["base_from_here"] == "../base"
    assert adapter["report"]["base"] == notes["base"]
    assert read(adapter["out"] / "adapter_config.json")["base_model_name_or_path"] == path


def test_the_merged_model_and_its_drift(adapter: dict[str, Any]) -> None:
    """The reported number is the largest difference there is on the fixed prompts; greedy answers agree on all
    20."""
    report = adapter["report"]["merged"]
    assert 0 < report["max_abs_logit_diff"] < 1e-4
    assert (report["equal_answers"], report["prompts"]) == (20, 20)
    merged = AutoModelForCausalLM.from_pretrained(adapter["out"] / "merged")
    assert_close(merged(IDS).logits, adapter["policy"](IDS).logits, atol=2e-5, rtol=1e-5)
    assert not any("lora" in name for name in keys(adapter["out"] / "merged" / "model.safetensors"))
    assert load_encoder(Model(path=str(adapter["out"] / "merged"))).digest == load_encoder(adapter["base"]).digest


def test_drift_sees_a_wrong_merge(tmp_path: Path) -> None:
    """A copy that is not the adapter's model must show in the report."""
    from align.models.save import drift

    base = save_tiny(tmp_path)
    policy = load_policy(base)
    other = load_policy(base)
    with torch.no_grad():
        other.model.norm.weight *= 1.5
    report = drift(policy, other, load_encoder(base))
    assert report["max_abs_logit_diff"] > 0.1


def test_a_policy_says_what_it_was_dequantised_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next stages, whose base is a policy and no longer the .gguf file, still say so."""
    monkeypatch.setattr("align.models.save.gguf.quantisation", lambda path: "Q4_1")
    base = save_tiny(tmp_path / "base")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    first = save_policy(
        load_policy(base), load_encoder(base), tmp_path / "first", base=Model(path=str(tmp_path / "m.gguf"))
    )
    second_base = Model(path=str(tmp_path / "first"))
    second = save_policy(load_policy(second_base), load_encoder(second_base), tmp_path / "second", base=second_base)
    assert first["base"]["dequantised_from"] == second["base"]["dequantised_from"] == "Q4_1"


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the moment (time, place) is in the folder, so equal policies have equal digests."""
    base = save_tiny(tmp_path / "base")
    for name in ("one", "two"):
        torch.manual_seed(0)
        save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / name, base=base, save_merged=True)
    files = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("one", "two")
    ]
    assert files[0] == files[1]
    targets = read(tmp_path / "one" / "adapter_config.json")["target_modules"]
    # PEFT keeps a set, whose order differs from process to process
    assert targets == sorted(targets) and len(targets) == 7


def test_the_encoders_tokenizer_is_left_alone(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    encoder = load_encoder(base)
    tokenizer = encoder.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    replaced = Encoder(tokenizer, chat_template=template("chatml") + " ")
    save_policy(load_policy(base), replaced, tmp_path / "out", base=base)
    assert tokenizer.chat_template == template("chatml")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template("chatml") + " "
