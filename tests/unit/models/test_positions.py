"""Are models of a kind that a recipe's stages can use, and long enough for their rows? Seen by `check`, and before the
first stage."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers import models as hf

from align.errors import EnvironmentFault, InputError
from align.model_families import FAMILIES, family_of
from align.models.adapters import add_lora
from align.models.files.bases import known_models
from align.models.files.positions import Positions, positions, positions_at, require_positions
from align.models.load import load_encoder, load_policy
from align.models.save import save_policy
from align.pipeline.runner import run_recipe
from align.preflight.model_limits import model_problems, require_engines
from align.preflight.models_here import refused
from align.recipe.load import load_recipe
from align.recipe.schema import Model
from align.rollout.limits import CPU_HEAD_SIZES, head_size, require_head_size
from tests.support.saved import LORA, edit, save_tiny

_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24, "vocab_size": 97}
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "vocab_size": 97,
}
KINDS: dict[str, Any] = {
    "biogpt": hf.BioGptConfig(**_SMALL),
    "bloom": hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=97),
    "codegen": hf.CodeGenConfig(**_GPT2, rotary_dim=4),
    "gpt2": hf.GPT2Config(**_GPT2),
    "gpt_bigcode": hf.GPTBigCodeConfig(**_GPT2),
    "gpt_neo": hf.GPTNeoConfig(**_SMALL, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]),
    "gptj": hf.GPTJConfig(**_GPT2, rotary_dim=4),
    "llama": hf.LlamaConfig(**_SMALL),
    "mpt": hf.MptConfig(d_model=32, n_heads=4, n_layers=1, max_seq_len=24, vocab_size=97),
    "opt": hf.OPTConfig(**_SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "qwen3": hf.Qwen3Config(**_SMALL, num_key_value_heads=2, head_dim=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_which_models_fail_behind_their_last_position(kind: str) -> None:
    """The table against transformers: a table of positions ends, rotations and slopes go on."""
    model: Any = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    found = positions(KINDS[kind].to_dict())
    ends = family_of(kind).table_of_positions
    assert found == (None if kind == "bloom" else Positions(24, ends))
    model(torch.arange(3, 27)[None], use_cache=False)
    if ends:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.arange(3, 35)[None], use_cache=False)
    else:
        model(torch.arange(3, 35)[None], use_cache=False)


def test_every_family_whose_positions_end_is_tried() -> None:
    assert {kind for kind, family in FAMILIES.items() if family.table_of_positions} <= KINDS.keys()


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 100}, 100),
        ({"text_config": {"max_position_embeddings": 100}, "max_position_embeddings": 7}, 100),
        (
            {"max_position_embeddings": 100, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 100}},
            400,
        ),
        (
            {
                "max_position_embeddings": 400,
                "rope_parameters": {"factor": 4.0, "original_max_position_embeddings": 100},
            },
            400,
        ),
        ({}, None),
        ({"max_position_embeddings": -1}, None),
        ({"model_type": "falcon", "alibi": True, "max_position_embeddings": 100}, None),
    ],
)
def test_positions_in_a_configuration(config: dict[str, Any], limit: int | None) -> None:
    found = positions(config)
    assert (found.limit if found else None) == limit


def test_up_to_the_last_position_nothing_is_said() -> None:
    assert require_positions(Positions(24, True), 24, "rows", "") is None
    assert require_positions(None, 10**9, "rows", "") is None
    with pytest.raises(InputError, match="rows: 25 tokens, the model has 24 positions and none behind them; shorten"):
        require_positions(Positions(24, True), 25, "rows", "shorten")


def recipe(folder: Path, text: str) -> Any:
    path = folder / "r.yaml"
    (folder / "rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}\n'
    )
    (folder / "pairs.jsonl").write_text('{"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}\n')
    path.write_text("name: r\nmodel: model\nstages:\n" + text)
    return load_recipe(str(path))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


STAGES = {
    "sft": ("  s: {kind: sft, data: rows.jsonl, max_length: LONG}\n", "max_length"),
    "dpo": ("  s: {kind: dpo, data: pairs.jsonl, max_length: LONG}\n", "max_length"),
    "reward": ("  s: {kind: reward, data: pairs.jsonl, max_length: LONG}\n", "max_length"),
    "evaluate": (
        "  s: {kind: evaluate, policies: [model], max_new_tokens: 1, data: rows.jsonl, max_length: LONG}\n",
        "max_length",
    ),
    "ppo": (
        (
            "  s: {kind: ppo, estimator: reinforce, reward: {rule: length, max: 3}, prompts: pairs.jsonl,"
            " max_prompt_length: LONG, max_new_tokens: 1}\n"
        ),
        "max_prompt_length",
    ),
    "later": (
        (
            "  a: {kind: sft, data: rows.jsonl, max_length: 20}\n  s: {kind: sft, policy: 'stage:a', data: rows.jsonl,"
            " max_length: LONG}\n"
        ),
        "max_length",
    ),
}


@pytest.mark.parametrize("kind", STAGES)
def test_rows_longer_than_learned_positions_are_refused_at_their_key(kind: str, here: Path) -> None:
    save_tiny(here / "model", "gpt2", n_positions=32)
    text, key = STAGES[kind]
    problems, _ = model_problems(recipe(here, text.replace("LONG", "99")))
    (problem,) = problems
    assert problem.key == f"stages.s.{key}" and problem.line is not None
    assert "tokens, the model has 32 positions and none behind them" in problem.message
    assert model_problems(recipe(here, text.replace("LONG", "31"))) == ([], [])


@pytest.mark.parametrize("kind", STAGES)
def test_rows_longer_than_rotary_positions_are_noted(kind: str, here: Path) -> None:
    save_tiny(here / "model", "llama", max_position_embeddings=32)
    problems, notes = model_problems(recipe(here, STAGES[kind][0].replace("LONG", "99")))
    assert not problems and len(notes) == 1
    assert "the model was made for 32 positions (max_position_embeddings)" in notes[0]
    assert "max_length: max_length" not in notes[0]


def test_a_run_is_refused_before_its_first_stage(here: Path) -> None:
    save_tiny(here / "model", "gpt2", n_positions=32)
    loaded = recipe(here, STAGES["later"][0].replace("LONG", "99"))
    with pytest.raises(InputError, match=r"r.yaml:5:\d+ stages.s.max_length: 99 tokens, the model has 32 positions"):
        run_recipe(loaded, console=Console(file=io.StringIO()))
    assert not (here / "runs" / "r" / "stages").exists()


def test_an_adapters_positions_are_its_bases(here: Path) -> None:
    base = save_tiny(here / "base", "gpt2", n_positions=48)
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), here / "model", base=base)
    assert positions_at(here / "model") == Positions(48, True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"use_dora": True}, "not supported: DoRA"), ({"peft_type": "IA3"}, "a IA3 adapter; only LORA is supported")],
)
def test_an_adapter_that_cannot_be_used_is_seen_by_check(here: Path, changes: dict[str, Any], says: str) -> None:
    base = save_tiny(here / "base")
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), here / "model", base=base)
    edit(here / "model/adapter_config.json", **changes)
    (problem,) = refused(recipe(here, STAGES["sft"][0].replace("LONG", "99")))
    assert (problem.key, problem.line) == ("model", 2)
    assert says in problem.message


# Engines


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"head_dim": 16}, 16),
        ({"hidden_size": 64, "num_attention_heads": 2}, 32),
        ({"n_embd": 64, "n_head": 4}, 16),
        ({}, None),
    ],
)
def test_head_sizes_that_vllm_cannot_serve_on_a_cpu(config: dict[str, Any], size: int | None) -> None:
    assert head_size(config) == size
    if size == 16:
        with pytest.raises(
            EnvironmentFault,
            match=r"vLLM on a CPU has no attention for heads of 16 .*; set rollout.engine: transformers",
        ):
            require_head_size(config)
    else:
        require_head_size(config)


@pytest.mark.vllm
@pytest.mark.slow
def test_the_head_sizes_are_vllms_own() -> None:
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    assert list(CPU_HEAD_SIZES) == backend.CPUAttentionBackend.get_supported_head_sizes()


@pytest.mark.parametrize(("engine", "refused"), [("vllm", True), ("auto", True), ("transformers", False)])
def test_an_engine_that_cannot_serve_a_model_is_refused_before_the_first_stage(
    here: Path, engine: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.recipe.blocks.rollout.find_spec", lambda name: object())
    monkeypatch.setattr("align.preflight.model_limits.gpu_memory", list)
    save_tiny(here / "model")
    loaded = recipe(
        here, STAGES["ppo"][0].replace("LONG", "9").replace("kind: ppo", f"kind: ppo, rollout: {{engine: {engine}}}")
    )
    if not refused:
        return require_engines(loaded, loaded.order)
    with pytest.raises(EnvironmentFault, match=r"r.yaml:4:\d+ stages.s: vLLM on a CPU has no attention for heads of 8"):
        require_engines(loaded, loaded.order)
    return None


# Bases that have moved


def test_a_base_is_found_where_both_have_moved(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "old" / "models" / "base")
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / "old" / "runs" / "a", base=base)
    os.rename(tmp_path / "old", tmp_path / "new")
    found = load_policy(Model(path=str(tmp_path / "new/runs/a")))
    assert found.get_base_model().name_or_path == str(tmp_path / "new/models/base")


def test_a_base_is_found_among_the_recipes_models_by_its_content(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / "a" / "b" / "adapter", base=base)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    other = save_tiny(tmp_path / "other", initializer_range=0.3)
    adapter = Model(path=str(tmp_path / "a/b/adapter"))
    with pytest.raises(InputError, match=r"the adapter's base is gone: .*base; it has the digest"):
        load_policy(adapter)
    with known_models([other, Model(path=str(tmp_path / "elsewhere"))]):
        assert load_policy(adapter).get_base_model().name_or_path == str(tmp_path / "elsewhere")
    with known_models([other]), pytest.raises(InputError, match="the adapter's base is gone"):
        load_policy(adapter)


def test_another_model_in_the_old_place_does_not_hide_the_right_one(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    save_policy(add_lora(load_policy(base), LORA), load_encoder(base), tmp_path / "adapter", base=base)
    shutil.move(tmp_path / "base", tmp_path / "kept")
    save_tiny(tmp_path / "base", initializer_range=0.3)
    with known_models([Model(path=str(tmp_path / "kept"))]):
        policy = load_policy(Model(path=str(tmp_path / "adapter")))
    assert policy.get_base_model().name_or_path == str(tmp_path / "kept")
