"""What an adapter of another tool may be: every setting of PEFT's LoRA is followed, harmless, merged or refused by its
name."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from align.errors import InputError, TrainingFault
from align.models import merging
from align.models.adapters import adapted, adapter_to_save, add_lora, lora_layers
from align.models.files.adapter_features import HARMLESS, MERGEABLE, REFUSED, SUPPORTED, refusals
from align.models.files.folder import read_folder
from align.models.load import load_encoder, load_policy
from align.models.merging import merged_copy, merged_weight, require_same
from align.recipe.blocks.rollout import VllmRollout
from align.recipe.schema import Lora, Model
from align.rollout import engines as opening
from align.rollout import sync
from align.rollout.engine import Sampling, WeightSource
from align.rollout.transformers import TransformersEngine
from tests.support.saved import LORA, edit, save_tiny
from tests.support.tiny import tiny

IDS = torch.arange(3, 33).reshape(2, 15)
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
FOLLOWED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"layers_to_transform": [1]},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "by a pattern": {"target_modules": r".*layers\.1\..*q_proj"},
    "with dropout": {"lora_dropout": 0.5},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
    "MiCA start": {"init_lora_weights": "mica"},
    "fan in, wrongly": {"fan_in_fan_out": True},
}
MERGED: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "modules_to_save ": {"modules_to_save": ["norm"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6, 7]},
    "lm_head.lora_A.weight": {"target_modules": ["q_proj", "lm_head"]},
    "embed_tokens.lora_embedding_A": {"target_modules": ["q_proj", "embed_tokens"]},
}
UNTIED = {"tie_word_embeddings": False}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def other_tool(folder: Path, settings: dict[str, Any], family: str = "qwen3", **changes: Any) -> tuple[Model, Tensor]:
    """An adapter as PEFT saves it, every trained part moved away from its start; and its logits."""
    base = save_tiny(folder / "base", family, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's notes on settings that it corrects
        model: Any = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(**{**PLAIN, **settings})
        )
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        model.eval().save_pretrained(folder / "adapter")
        return Model(path=str(folder / "adapter")), logits(model)


# The table


def test_every_setting_of_peft_is_in_the_table_once() -> None:
    """A newer PEFT may bring a setting: somebody has to say what it means here before it is let through."""
    known = [*SUPPORTED, *HARMLESS, *MERGEABLE, *REFUSED]
    assert sorted(known) == sorted(field.name for field in dataclasses.fields(LoraConfig))


SET: dict[str, Any] = {
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "target_parameters": ["experts.up"],
}


@pytest.mark.parametrize("name", sorted({*MERGEABLE, *REFUSED}))
def test_what_is_not_followed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """As soon as the folder is read: no model is loaded, and `check` sees it. Alone, whatever its value is."""
    value = SET.get(name, True)
    adapter, _ = other_tool(tmp_path, {})
    edit(Path(adapter.path) / "adapter_config.json", **{name: value})
    with pytest.raises(InputError, match=rf"adapter_config.json {name}: not supported: .*; .*merge") as caught:
        read_folder(Path(adapter.path))
    assert ("`align merge " in str(caught.value)) == (name in MERGEABLE)
    assert [found for found, _, _ in refusals({name: value}, ())] == [name]
    assert bool(list(refusals({name: value}, (), merging=True))) == (name in REFUSED)


@pytest.mark.parametrize("name", sorted({*SUPPORTED, *HARMLESS}))
def test_what_is_followed_or_harmless_passes(name: str) -> None:
    assert not list(refusals({name: SET.get(name, True)}, ()))


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "something new"])
def test_an_initialisation_that_changed_the_base_is_refused(value: str) -> None:
    ((name, why, helps),) = refusals({"init_lora_weights": value}, (), merging=True)
    assert (name, helps) == ("init_lora_weights", False) and value in why


def test_a_setting_of_a_newer_peft_is_refused_where_it_is_set() -> None:
    assert [name for name, _, _ in refusals({"use_new": True, "use_newer": None, "newest": []}, ())] == ["use_new"]


def test_a_setting_that_is_off_is_no_feature() -> None:
    plain = {
        field.name: field.default
        for field in dataclasses.fields(LoraConfig)
        if field.default is not dataclasses.MISSING
    }
    assert not list(
        refusals(
            {**plain, "bias": "none", "modules_to_save": None}, ("base_model.model.model.layers.0.q.lora_A.weight",)
        )
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("base_model.model.lm_head.lora_A.weight", "it adapts the LM head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "it adapts an embedding"),
        ("base_model.model.model.embed_tokens.weight", "it holds a whole tensor"),
        ("base_model.model.model.layers.0.q_proj.lora_B.bias", "it holds a whole tensor"),
        ("base_model.model.model.layers.0.q_proj.lora_magnitude_vector", "it holds a whole tensor"),
    ],
)
def test_tensors_that_the_settings_do_not_tell_of(name: str, why: str) -> None:
    """Tools add the embedding that they resized; an older PEFT did so in silence."""
    ((found, reason, helps),) = refusals({}, [name, "base_model.model.model.layers.0.q_proj.lora_A.weight"])
    assert found == name and reason.startswith(why) and helps


def test_other_kinds_of_adapters_come_with_the_way_out(tmp_path: Path) -> None:
    adapter, _ = other_tool(tmp_path, {})
    edit(Path(adapter.path) / "adapter_config.json", peft_type="LOHA", task_type="SEQ_CLS")
    with pytest.raises(
        InputError, match="a LOHA adapter; only LORA is supported; merge it into its base with the tool that made it"
    ):
        load_policy(adapter)


# What is followed is right, everywhere it is used


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_followed_feature_is_right_loaded_merged_synced_and_built_upon(kind: str, tied: bool, tmp_path: Path) -> None:
    adapter, expected = other_tool(tmp_path, FOLLOWED[kind], tie_word_embeddings=tied)
    policy = load_policy(adapter)
    assert (logits(load_policy(Model(path=str(tmp_path / "base")))) - expected).abs().max() > 0.05
    assert_close(logits(policy.train()), expected, atol=0, rtol=0)  # frozen: training has no say in it
    assert_close(logits(merged_copy(policy)), expected, atol=3e-5, rtol=1e-5)
    assert_close(logits(_synced(policy, tmp_path / "base")), expected, atol=3e-5, rtol=1e-5)
    second = add_lora(policy, Lora(rank=2, alpha=4))
    assert_close(logits(second), expected, atol=0, rtol=0)
    _moved(second)
    joined = _plain_peft(tmp_path, second)
    assert_close(logits(joined), logits(second), atol=3e-5, rtol=1e-5)


def _synced(policy: nn.Module, base: Path) -> nn.Module:
    """A plain model with the weights that an engine is sent, all of them."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_state_dict(
        dict(sync.policy_weights(policy)), strict=True
    ) if not plain.config.tie_word_embeddings else _copy(plain, policy)
    return plain


def _copy(plain: nn.Module, policy: nn.Module) -> None:
    sent = dict(sync.policy_weights(policy))
    assert_close(sent["lm_head.weight"], sent["model.embed_tokens.weight"], atol=0, rtol=0)
    plain.load_state_dict(sent, strict=True)


def _moved(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.normal_(std=0.1)


def _plain_peft(tmp_path: Path, model: nn.Module) -> nn.Module:
    """The adapters saved as one, loaded by PEFT alone."""
    state, config = adapter_to_save(model)
    folder = tmp_path / "joined"
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(state, folder / "adapter_model.safetensors")
    loaded: nn.Module = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder)
    return loaded


def test_every_adapter_of_a_stack_is_sent_to_the_engine(tmp_path: Path) -> None:
    """LoRA on LoRA: the newest alone is another model, in each weight that both adapt."""
    adapter, start = other_tool(tmp_path, {"target_modules": "all-linear"})
    stacked = add_lora(load_policy(adapter), LORA)
    _moved(stacked)
    together = logits(stacked)
    assert (together - start).abs().max() > 0.05
    assert_close(logits(_synced(stacked, tmp_path / "base")), together, atol=3e-5, rtol=1e-5)
    base = load_policy(Model(path=str(tmp_path / "base")))
    for name, layer in lora_layers(stacked).items():
        expected = base.get_parameter(f"{name.removeprefix('base_model.model.')}.weight").detach().clone()
        for adapter_name in ("start", "default"):
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            expected += (b @ a).detach() * layer.scaling[adapter_name]
        assert_close(merged_weight(layer), expected, atol=1e-6, rtol=1e-5)


def test_the_model_in_training_is_not_touched_by_merging_its_layers(tmp_path: Path) -> None:
    model = add_lora(tiny("llama").to(torch.bfloat16), LORA)
    _moved(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = dict(sync.policy_weights(model))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(not layer.merged_adapters for layer in lora_layers(model).values())


# What is only merged


@pytest.mark.parametrize("kind", MERGED)
def test_what_is_refused_for_training_is_merged_right(kind: str, tmp_path: Path) -> None:
    adapter, expected = other_tool(tmp_path, MERGED[kind], **UNTIED)
    with pytest.raises(InputError, match=rf"{kind.strip()}: not supported: .*; `align merge .*adapter --out DIR`"):
        load_policy(adapter)
    assert_close(logits(merged_copy(load_policy(adapter, merging=True))), expected, atol=3e-5, rtol=1e-5)


def test_a_bias_of_the_update_is_merged_into_the_layers_own(tmp_path: Path) -> None:
    adapter, expected = other_tool(tmp_path, {"lora_bias": True}, "glm", attention_bias=True)
    assert_close(logits(merged_copy(load_policy(adapter, merging=True))), expected, atol=3e-5, rtol=1e-5)


def test_a_bias_of_the_update_without_a_layers_own_cannot_be_merged(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says so, and saves the adapter all the same
        adapter, _ = other_tool(tmp_path, {"lora_bias": True})
        policy = load_policy(adapter, merging=True)
        with pytest.raises(
            InputError, match="the adapter cannot be merged: Impossible to merge LoRA with `lora_bias=True`"
        ):
            merged_copy(policy)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_head_that_was_adapted_alone_is_a_head_of_its_own(target: str, tmp_path: Path) -> None:
    """What is merged into the head is no part of the embedding, nor the other way round; the configuration says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied layers
        adapter, expected = other_tool(tmp_path, {"target_modules": ["q_proj", target]}, tie_word_embeddings=True)
        plain = merged_copy(load_policy(adapter, merging=True))
    assert_close(logits(plain), expected, atol=3e-5, rtol=1e-5)
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path / "out")
    assert_close(logits(load_policy(Model(path=str(tmp_path / "out")))), expected, atol=3e-5, rtol=1e-5)


# Proofs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "glm4"])
def test_rounding_is_no_difference(family: str, dtype: torch.dtype) -> None:
    model = add_lora(tiny(family).to(dtype), LORA)
    _moved(model)
    assert require_same(model, merged_copy(model)) < merging._ROUNDINGS / 4


def test_a_merge_that_leaves_something_out_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter of two in one layer of all, in fp32: nothing is saved of it."""
    adapter, _ = other_tool(tmp_path, {})
    stacked = add_lora(load_policy(adapter), LORA)
    _moved(stacked)
    layers = iter(range(1000))
    whole = merging._merge

    def forgetful(layer: Any, dtype: torch.dtype = torch.float32) -> None:
        if next(layers) == 0:
            layer.lora_B["start"].weight.data.zero_()
        whole(layer, dtype)

    monkeypatch.setattr(merging, "_merge", forgetful)
    with pytest.raises(
        InputError, match=r"the merged model is another one than its adapter: they differ by \S+ roundings"
    ):
        merged_copy(stacked)


def test_an_adapter_that_is_no_number_is_named(tmp_path: Path) -> None:
    adapter, _ = other_tool(tmp_path, {})
    path = Path(adapter.path) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[2]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf"adapter_model.safetensors: {name} is not finite"):
        load_policy(adapter)


class _Forgetful(TransformersEngine):
    """Keeps the weights that it began with."""

    def load_weights(self, weights: WeightSource) -> None:
        self._version = weights.version


@pytest.mark.parametrize(("kind", "works"), [(TransformersEngine, True), (_Forgetful, False)])
def test_an_engine_with_an_adapter_is_proved_before_it_samples(
    kind: type[TransformersEngine], works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM starts with the base; a stage that only samples must not get the base's answers either."""
    adapter, _ = other_tool(tmp_path, {"lora_alpha": 64})
    base = Model(path=str(tmp_path / "base"))
    encoder = load_encoder(base)
    monkeypatch.setattr("align.recipe.blocks.rollout.find_spec", lambda name: object())
    engine_of = lambda *arguments: kind(load_policy(base), encoder, max_length=64, shared=False)  # noqa: E731
    monkeypatch.setattr(opening, "registered", lambda place: engine_of)
    rollout = VllmRollout(engine="vllm", dtype="fp32")
    opened = opening.open_engine(rollout, adapter, encoder, max_length=64, cache=tmp_path, resolve=Path)
    if not works:
        with pytest.raises(TrainingFault, match="does not sample from the trained weights"), opened:
            pass
        return
    with opened as engine:
        prompts = [[5, 6, 7]]
        sampled = engine.generate(prompts, Sampling(max_new_tokens=6, n=4))
        expected = sync.policy_logprobs(load_policy(adapter), prompts, sampled)
    for completion, theirs in zip(sampled[0], expected, strict=True):
        assert_close(torch.tensor(completion.logprobs), torch.from_numpy(theirs), atol=1e-4, rtol=0)


# Which layers are adapted


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("llama", "adapters on 14 linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("gpt2", "adapters on 8 linear layers: c_attn, c_fc, c_proj"),
        (
            "sinks",
            r"adapters on 8 linear layers: k_proj, o_proj, q_proj, v_proj; none on the experts \(\d+,\d+ parameters\)",
        ),
        (
            "qwen3_next",
            r"adapters on 9 linear layers: in_proj_ba, .*v_proj; none on the experts \(\d+,\d+ parameters\)",
        ),
    ],
)
def test_the_adapted_layers_in_one_line(family: str, says: str) -> None:
    assert re.fullmatch(says, adapted(add_lora(tiny(family), LORA)))


def test_a_layer_that_peft_takes_for_experts_is_not_adapted_under_its_name() -> None:
    """PEFT reads the shared expert's names as those of the experts in older checkpoints, and would adapt these, at
    twice the rank."""
    with pytest.raises(InputError, match=r"lora.target_modules: 'up_proj': PEFT would adapt the experts instead"):
        add_lora(tiny("qwen3_next"), Lora(target_modules=["q_proj", "up_proj"]))
