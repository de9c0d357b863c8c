"""What a recipe may say of PPO, and what is refused because it would silently mean something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import InputError
from align.pipeline.identity import normalised
from align.recipe.load import load_recipe
from align.recipe.schema import PpoStage


def problem(tmp_path: Path, **options: Any) -> str:
    """What `align check` says of a PPO stage with these options; empty when nothing."""
    for name in ("prompts.jsonl", "talk.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    stage = {"kind": "ppo", "reward": "org/reward", "prompts": str(tmp_path / "prompts.jsonl"), **options}
    recipe = {"name": "r", "model": "org/model", "stages": {"ppo": stage}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    try:
        load_recipe(str(tmp_path / "r.yaml"))
    except InputError as error:
        return str(error)
    return ""


def test_the_shortest_stage_has_the_papers_numbers(tmp_path: Path) -> None:
    """ChatGLM-RLHF: learning rate 1e-6, 600 to 800 iterations, the reference baseline, no whitening."""
    assert problem(tmp_path) == ""
    spec = PpoStage.model_validate({"kind": "ppo", "reward": "org/reward", "prompts": "p.jsonl"})
    assert spec.train.learning_rate == 1e-6 and 600 <= spec.iterations <= 800 and spec.temperature == 1.0
    assert spec.uses_baseline and not spec.whiten_rewards and not spec.whiten_advantages
    assert spec.total_steps == spec.iterations * spec.ppo_epochs * spec.minibatches


@pytest.mark.parametrize("key", ["top_p", "top_k"])
def test_biased_sampling_has_no_key(tmp_path: Path, key: str) -> None:
    """They would sample from another distribution than the one whose ratio is taken."""
    assert f"stages.ppo.{key}: unknown key" in problem(tmp_path, **{key: 0.9})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "must be greater than 0"),
        ({"estimator": "rloo"}, "samples_per_prompt must be at least 2"),
        ({"estimator": "group", "samples_per_prompt": 4, "reference_baseline": True}, "it cancels"),
        ({"estimator": "reinforce", "reference_baseline": False}, "nothing without its baseline"),
        (
            {"estimator": "rloo", "samples_per_prompt": 2, "lam": 0.9},
            "ppo.lam: has no effect with estimator: rloo",
        ),
        (
            {"estimator": "rloo", "samples_per_prompt": 2, "whiten_rewards": True},
            "ppo.whiten_rewards: has no effect",
        ),
        ({"sft_weight": 0.1}, "stages.ppo.sft_weight: has no effect without sft_data"),
        ({"eval_sft_data": "talk.jsonl"}, "stages.ppo.eval_sft_data: has no effect without eval_prompts"),
        ({"minibatches": 5, "train": {"batch_size": 4}}, "4 prompts (train.batch_size) cannot be cut into 5"),
        ({"lora": {"dropout": 0.1}}, "the ratio never 1"),
        ({"on_unhealthy": "stop"}, "there is none without train.save_steps"),
        ({"train": {"epochs": 2}}, "epochs: the length of ppo is `iterations`"),
        ({"train": {"max_steps": 2, "tokens_per_step": 100}}, "max_steps, tokens_per_step"),
        ({"train": {"batch_size": None}}, "number of prompts in one iteration"),
        ({"clip": 1.5}, "must be less than 1"),
        ({"reward": {"rule": "length", "max": 9}}, "write value_init: policy"),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    if "eval_sft_data" in options:
        options = {"eval_sft_data": str(tmp_path / "talk.jsonl")}
    assert words in problem(tmp_path, **options)


def test_the_baseline_follows_the_estimator() -> None:
    """On where it teaches something, off where it would cancel."""
    for estimator, expected in {"gae": True, "reinforce": True, "rloo": False, "group": False}.items():
        spec = PpoStage.model_validate(
            {"kind": "ppo", "reward": "a/b", "prompts": "p.jsonl", "estimator": estimator, "samples_per_prompt": 2}
        )
        assert spec.uses_baseline == expected


def test_where_the_value_model_starts() -> None:
    """The reward model, unless another one is named, or there is none, or the policy is meant."""

    def start(**options: Any) -> str | None:
        return PpoStage.model_validate({"kind": "ppo", "reward": "a/b", "prompts": "p.jsonl", **options}).value_start

    rule = {"rule": "length", "max": 9}
    assert start() == "a/b" and start(value_model="c/d") == "c/d" and start(value_init="policy") is None
    assert start(reward=rule, value_init="policy") is None and start(reward=rule, value_model="c/d") == "c/d"
    assert start(estimator="reinforce") is None


def test_health_is_no_part_of_the_identity() -> None:
    """A run that was stopped goes on with another bound: the same work folder, the same checkpoint."""
    stage: dict[str, Any] = {"kind": "ppo", "reward": "a/b", "prompts": "p.jsonl", "train": {"save_steps": 5}}
    loose = PpoStage.model_validate({**stage, "health": {"kl": 2.0}, "on_unhealthy": "stop"})
    assert normalised(loose) == normalised(PpoStage.model_validate(stage))
    assert normalised(PpoStage.model_validate({**stage, "kl_coefficient": 0.2})) != normalised(loose)


def test_a_policy_is_no_reward_model(tmp_path: Path) -> None:
    """References are checked by type before anything runs."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    stages = {
        "sft": {"kind": "sft", "data": str(tmp_path / "prompts.jsonl")},
        "ppo": {"kind": "ppo", "reward": "stage:sft", "prompts": str(tmp_path / "prompts.jsonl")},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", "model": "org/model", "stages": stages}))
    with pytest.raises(InputError, match="`sft` makes a policy, a reward model is wanted here"):
        load_recipe(str(tmp_path / "r.yaml"))
