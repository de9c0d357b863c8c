"""The plan of a PPO stage: what is in memory and on disk, and how much is sampled and trained, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.planning.plan import make_plan
from align.recipe.load import load_recipe
from align.recipe.schema import Lora, PpoStage
from align.sizing import ppo_needs
from align.sizing.shapes import GLM_4_9B, Shape
from tests.support.saved import save_tiny

SMOL = Shape(30, 576, 9, 3, 64, 1536, 49152, tied=True)


def spec(**options: Any) -> PpoStage:
    return PpoStage.model_validate({"kind": "ppo", "reward": "org/reward", "prompts": "p.jsonl", **options})


def terms(shape: Shape, stage: PpoStage, device: str = "cpu", budget: float | None = None) -> dict[str, float]:
    return {term.name: term.amount for term in ppo_needs.memory(shape, stage, device=device, budget=budget)}


def test_four_models_in_full_training() -> None:
    """SmolLM2, fp32: policy and value model with gradients and moments, 16 bytes a parameter each; reference, reward
    model and vLLM's copy 4 each; vLLM's cache 2 GB."""
    found, p = terms(SMOL, spec()), SMOL.parameters
    assert found["weights"] + found["gradients"] + found["Adam moments"] == 16 * p
    assert found["value model"] == 16 * (p + 576)
    assert found["reference"] == found["reward model"] == found["rollout engine"] == 4 * p
    assert found["rollout cache"] == 2e9
    ours = sum(amount for name, amount in found.items() if name not in ("slack", "rollout engine", "rollout cache"))
    assert found["slack"] == pytest.approx(0.15 * ours), "vLLM takes all it needs when it starts"


def test_an_untied_head_is_no_part_of_a_value_model() -> None:
    untied = Shape(30, 576, 9, 3, 64, 1536, 49152, tied=False)
    assert terms(untied, spec())["value model"] == 16 * (untied.parameters - 49152 * 576 + 576)


def test_one_base_with_adapters() -> None:
    """GLM-4 in bf16 with LoRA: the base once; no reference of its own; the value model is an adapter and a head,
    fp32."""
    reward = {"model": "org/reward", "dtype": "bf16"}
    stage = spec(lora={"rank": 32}, reward=reward, train={"dtype": "bf16"}, rollout={"cache_gb": 10.0})
    found = terms(GLM_4_9B, stage, "cuda", 80e9)
    adapter = GLM_4_9B.lora_parameters(32, "all-linear")
    assert "reference" not in found and found["value model"] == 16 * (adapter + 4096)
    assert found["rollout engine"] == found["reward model"] == 2 * GLM_4_9B.parameters
    assert found["rollout cache"] == 10e9
    assert terms(GLM_4_9B, spec(lora={}, train={"dtype": "bf16"}), "cuda", 80e9)["rollout cache"] == pytest.approx(
        80e9 / 3
    )


def test_fewer_models_need_less() -> None:
    """No value model without gae; nothing for an engine that samples from the policy itself."""
    found = terms(SMOL, spec(estimator="rloo", samples_per_prompt=4, rollout={"engine": "transformers"}))
    assert not {"value model", "rollout engine", "rollout cache"} & found.keys()


def test_divided_models() -> None:
    """Among four processes: a quarter of policy, reference and value model; beside them what is whole for a while. Before
    they are divided all three are whole in each process."""
    stage = spec(
        train={"sharding": "full"}, rollout={"engine": "transformers"}, reward={"rule": "json"}, value_init="policy"
    )
    whole = {t.name: t.amount for t in ppo_needs.memory(SMOL, spec(), device="cpu")}
    run = {t.name: t.amount for t in ppo_needs.memory(SMOL, stage, device="cpu", processes=4)}
    assert all(4 * run[name] == whole[name] for name in ("weights", "Adam moments", "value model", "reference"))
    assert run["other whole embeddings"] == 4 * (SMOL.parameters - SMOL.matrices) + 12 * SMOL.vocab * SMOL.hidden
    without = stage.model_copy(update={"lora": Lora()})
    run = {t.name: t.amount for t in ppo_needs.memory(SMOL, without, device="cpu", processes=4)}
    assert not {"reference", "other whole embeddings"} & run.keys()


def test_disk_holds_the_value_model_too() -> None:
    often = spec(train={"save_steps": 5, "save_total_limit": 3})
    found = {term.name: term.amount for term in ppo_needs.disk(SMOL, often, tokens=None, dequantises=False)}
    assert found["value model in checkpoints"] == 4 * 12 * (SMOL.parameters + 576)
    assert found["saved value model"] == 4 * (SMOL.parameters + 576)


def test_what_an_iteration_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts, 5 iterations of 2 prompts with 4 answers of at most 10 tokens, two passes in two minibatches, two
    models."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    Path("prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in ("tea", "rain", "sun"))
    )
    stage = {
        "kind": "ppo",
        "reward": "org/reward",
        "prompts": "prompts.jsonl",
        "iterations": 5,
        "samples_per_prompt": 4,
        "max_new_tokens": 10,
        "ppo_epochs": 2,
        "minibatches": 2,
        "train": {"batch_size": 2},
    }
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./model", "stages": {"ppo": stage}}))
    (plan,) = make_plan(load_recipe("r.yaml")).stages
    rows = {row.name: row for row in plan.rows}
    prompts, tokens = (int(word) for word in rows["prompts"].value.replace(" tokens", "").split(" prompts, "))
    assert prompts == 3 and 3 * 8 < tokens < 3 * 40
    assert rows["an iteration takes"].value == "2 prompts x 4 answers of at most 10 tokens"
    assert rows["steps"].value == "20" and rows["sampled in all"].value == "at most 400 tokens"
    expected = int((5 * 2 * tokens / 3 + 400) * 2 * 2)
    assert rows["tokens in all"].value == f"at most {expected:,}"
    assert "sampling" in rows["time"].source and rows["time"].value.startswith("at most about")
    assert plan.memory is not None and "  value model" in rows and not plan.problems


def test_prompts_of_a_stage_that_has_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not counted, and not unknown either: there is a bound."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    stage = {"kind": "ppo", "reward": "org/reward", "prompts": "org/prompts", "max_prompt_length": 50}
    Path("r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./model", "stages": {"ppo": stage}}))
    (plan,) = make_plan(load_recipe("r.yaml")).stages
    rows = {row.name: row for row in plan.rows}
    assert rows["prompts"].value == "from org/prompts" and "at most 50 tokens each" in rows["prompts"].source
    assert "unknown" not in {row.value for row in plan.rows}


def test_glm4_fits_eight_gpus(tmp_path: Path) -> None:
    """The shipped recipe, with everything counted, the allocator's slack included."""
    plan = make_plan(load_recipe("glm4_ppo"), tmp_path / "runs")
    ppo = next(stage for stage in plan.stages if stage.name == "ppo")
    assert ppo.memory is not None and 60e9 < ppo.memory < 80e9 and not plan.problems
    assert {"  reward model", "  rollout engine", "  value model"} <= {row.name for row in ppo.rows}
    assert "  reference" not in {row.name for row in ppo.rows}, "it is the policy with its adapter off"
