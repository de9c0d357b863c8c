"""Keys without effect: every one that the schema declares is refused at its place, and every key does something
somewhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import align
from align.errors import InputError
from align.pipeline.identity import NEUTRAL, normalised
from align.recipe.checks.fields import models_in
from align.recipe.language.effects import declared
from align.recipe.load import load_recipe
from align.recipe.schema import BUILTIN_STAGES, Hardware, Model, Recipe, Stage

DATA = {"data": "rows.jsonl"}
SFT = {"kind": "sft", **DATA}
DPO = {"kind": "dpo", **DATA}
REWARD = {"kind": "reward", **DATA}
PPO = {"kind": "ppo", "reward": "./model", "prompts": "rows.jsonl"}
RLOO = {**PPO, "estimator": "rloo", "samples_per_prompt": 2}
ASKED = {"kind": "evaluate", "policies": ["./model"]}
BENCH = {
    "kind": "evaluate",
    "scorers": [{"rule": "repetition"}],
    "tasks": [{"task": "reward_bench", "data": "rows.jsonl"}],
}
JUDGE = {"endpoint": "https://host/v1", "model": "m"}
EVALUATION = {"train": {"eval_steps": 2, "load_best_model": True, "early_stopping_patience": 1}}

Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""A stage; keys without effect in it; what gives them one."""

CASES: dict[tuple[str, str], Case] = {
    ("Train", "min_lr_ratio"): (
        SFT,
        {"train": {"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}},
        {"train": {"lr_scheduler_type": "linear"}},
    ),
    ("Hardware", "nodes"): (SFT, {"hardware": {"memory_gb": 8, "nodes": 2}}, {"hardware": {"gpus": 1}}),
    ("Judge", "against"): (
        {**ASKED, **DATA},
        {"judge": {**JUDGE, "methods": ["pointwise"], "against": "target"}},
        {"judge": {"methods": ["pairwise"]}},
    ),
    ("ModelScorer", "revision chat_template chat_template_kwargs max_length grades"): (
        PPO,
        {
            "reward": {
                "model": "stage:r",
                "revision": "x",
                "chat_template": "t.jinja",
                "chat_template_kwargs": {"a": 1},
                "max_length": 9,
                "grades": {"a": 1.0},
            }
        },
        {"reward": {"model": "org/name"}},
    ),
    **{
        (name, "train.eval_steps train.load_best_model train.early_stopping_patience"): (
            stage,
            EVALUATION,
            {"eval_data": "rows.jsonl"},
        )
        for name, stage in (("SftStage", SFT), ("DpoStage", DPO), ("RewardStage", REWARD))
    },
    **{
        (name, f"lora.{key}"): (
            stage,
            {"lora": {key: value}, "train": {"sharding": "full"}},
            {"train": {"sharding": "none"}},
        )
        for name, stage in (("SftStage", SFT), ("DpoStage", DPO), ("RewardStage", REWARD), ("PpoStage", PPO))
        for key, value in (("quantize", "nf4"), ("save_merged", True))
    },
    ("DpoStage", "label_smoothing"): (DPO, {"loss": "ipo", "label_smoothing": 0.1}, {"loss": "sigmoid"}),
    ("RewardStage", "l2 soft_labels length_balance filters"): (
        {**REWARD, "grades": {"a": 1.0}},
        {"l2": 0.1, "soft_labels": True, "length_balance": True, "filters": True},
        {"grades": None},
    ),
    ("SigmoidLoss", "soft_labels"): (
        DPO,
        {"loss": {"name": "sigmoid", "soft_labels": True, "label_smoothing": 0.1}},
        {"loss": {"label_smoothing": None}},
    ),
    ("DpoStage", "offset"): (DPO, {"loss": "ipo", "offset": 0.1}, {"loss": "sigmoid"}),
    ("DpoStage", "soft_labels"): (DPO, {"loss": "ipo", "soft_labels": True}, {"loss": "sigmoid"}),
    ("DpoStage", "gamma"): (DPO, {"loss": "ipo", "gamma": 0.1}, {"loss": "simpo"}),
    (
        "PpoStage",
        "gamma lam value_init value_model value_learning_rate value_clip whiten_rewards health.explained_variance",
    ): (
        RLOO,
        {
            "gamma": 0.9,
            "lam": 0.9,
            "value_init": "policy",
            "value_learning_rate": 1e-5,
            "value_clip": 0.1,
            "whiten_rewards": True,
            "health": {"explained_variance": 0.1},
        },
        {"estimator": "gae"},
    ),
    ("PpoStage", "value_init"): (PPO, {"value_model": "./model", "value_init": "policy"}, {"value_model": None}),
    ("PpoStage", "reference_baseline"): (RLOO, {"reference_baseline": True}, {"estimator": "gae"}),
    ("PpoStage", "baseline_samples"): (RLOO, {"baseline_samples": 2}, {"estimator": "gae"}),
    ("PpoStage", "kl_target"): (PPO, {"kl_coefficient": 0, "kl_target": 1.0}, {"kl_coefficient": 0.1}),
    ("PpoStage", "target_kl"): (PPO, {"target_kl": 0.1}, {"ppo_epochs": 2}),
    ("PpoStage", "importance_cap"): (
        PPO,
        {"importance_cap": 2.0, "rollout": {"engine": "transformers"}},
        {"rollout": {"engine": "auto"}},
    ),
    ("PpoStage", "sft_weight sft_batch_size health.sft_loss"): (
        PPO,
        {"sft_weight": 0.1, "sft_batch_size": 2, "health": {"sft_loss": 0.1}},
        {"sft_data": "rows.jsonl"},
    ),
    ("PpoStage", "eval_sft_data samples train.eval_steps train.load_best_model train.early_stopping_patience"): (
        PPO,
        {"eval_sft_data": "rows.jsonl", "samples": 1, **EVALUATION},
        {"eval_prompts": "rows.jsonl"},
    ),
    ("EvaluateStage", "samples_per_prompt temperature max_new_tokens max_length embedder"): (
        {**ASKED, "probes": ["json"]},
        {"samples_per_prompt": 2, "temperature": 0.5, "max_new_tokens": 9, "max_length": 99, "embedder": "./model"},
        DATA,
    ),
    ("EvaluateStage", "scorers judge"): (
        {**ASKED, "probes": ["json"]},
        {"scorers": [{"rule": "repetition"}], "judge": {**JUDGE, "against": "target"}},
        DATA,
    ),
    ("EvaluateStage", "judge.against"): (BENCH, {"judge": {**JUDGE, "against": "target"}}, {**DATA, **ASKED}),
    ("EvaluateStage", "policies rollout"): (
        BENCH,
        {"policies": ["./model"], "rollout": {"engine": "transformers"}},
        {"probes": ["json"]},
    ),
    ("EvaluateStage", "rollout"): (
        {**ASKED, "lm_eval_tasks": ["x"]},
        {"rollout": {"engine": "transformers"}},
        {"probes": ["json"]},
    ),
    ("EvaluateStage", "own_names"): ({**ASKED, "probes": ["json"]}, {"own_names": ["me"]}, {"probes": ["identity"]}),
    ("TrlStage", "reward"): (
        {"kind": "trl", "trainer": "kto", **DATA},
        {"reward": {"rule": "json"}},
        {"trainer": "grpo"},
    ),
    ("TrlStage", "too_long"): (
        {"kind": "trl", "trainer": "grpo", "reward": {"rule": "json"}, **DATA},
        {"too_long": "error"},
        {"trainer": "kto", "reward": None},
    ),
    ("TrlStage", "eval_data"): (
        {"kind": "trl", "trainer": "online_dpo", "reward": {"rule": "json"}, **DATA},
        {"eval_data": "rows.jsonl"},
        {"trainer": "grpo"},
    ),
}


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all that its fields mention, at any depth, each once."""
    found: dict[type[BaseModel], None] = {}

    def visit(one: type[BaseModel]) -> None:
        if one not in found:
            found[one] = None
            for field in one.model_fields.values():
                for inner in models_in(field.annotation):
                    visit(inner)

    visit(model)
    return iter(found)


ALL = dict.fromkeys(model for start in (*BUILTIN_STAGES.values(), Hardware, Model) for model in models(start))


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both, with nested mappings merged; ``None`` in the second removes a key."""
    result = dict(one)
    for key, value in other.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = (
                merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
            )
    return result


def written(stage: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe with the stage, block style, so that every key has a line of its own."""
    stage = dict(stage)
    more = {key: stage.pop(key) for key in ("hardware",) if key in stage}
    path = tmp_path / "r.yaml"
    recipe = {"name": "r", "model": "./model", **more, "stages": {"r": REWARD, "it": stage}}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("rows.jsonl").write_text("")
    Path("t.jinja").write_text("")


def test_every_declared_key_has_a_case() -> None:
    found = {(model.__name__, needs.keys) for model in ALL for needs in vars(model).get("key_needs", ())}
    assert found == CASES.keys()


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_keys_without_effect_are_refused_where_they_stand(case: tuple[str, str], tmp_path: Path) -> None:
    stage, idle, remedy = CASES[case]
    path = written(merged(stage, idle), tmp_path)
    lines = path.read_text().splitlines()
    with pytest.raises(InputError) as caught:
        load_recipe(str(path))
    problems = [p for p in caught.value.problems if p.message.startswith("has no effect ")]
    keys = {str(problem.key) for problem in problems}
    # Beside value_init it has a case of its own
    expected = {key.rpartition(".")[2] for key in case[1].split()} - {"value_model"}
    assert {key.rpartition(".")[2] for key in keys} >= expected & {key for part in flat(idle) for key in part}
    for problem in problems:
        assert problem.line and lines[problem.line - 1].strip().startswith(str(problem.key).rpartition(".")[2] + ":")
    load_recipe(str(written(merged(merged(stage, idle), remedy), tmp_path)))


def flat(value: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys of nested mappings, each as the names that lead to it."""
    for key, item in value.items():
        yield (key,)
        if isinstance(item, dict):
            yield from ((key, *rest) for rest in flat(item))


def test_null_false_and_nothing_ask_for_nothing() -> None:
    """A generated recipe may write every key; only what asks for something in vain is a mistake."""
    BUILTIN_STAGES["dpo"].model_validate(
        {**DPO, "gamma": None, "label_smoothing": None, "train": {"load_best_model": False}}
    )
    BUILTIN_STAGES["ppo"].model_validate({**PPO, "samples": 0, "sft_weight": 0})
    BUILTIN_STAGES["ppo"].model_validate({**RLOO, "whiten_rewards": False, "value_clip": None, "value_model": None})
    with pytest.raises(ValidationError, match="has no effect with loss: sigmoid"):
        BUILTIN_STAGES["dpo"].model_validate({**DPO, "gamma": 0.0})


def test_defaults_are_never_refused() -> None:
    """Only keys that are written count, in bases and nested models too."""
    for model in ALL:
        for needs in declared(model):
            for path in needs.paths:
                assert path[0] in model.model_fields, (model, path)
    for spec in (SFT, DPO, REWARD, PPO, RLOO):
        BUILTIN_STAGES[spec["kind"]].model_validate(spec)


# Every key does something


def read_names() -> set[str]:
    """Attributes that the package's code reads, the schema left out, and keys of mappings that it looks up."""
    package = Path(align.__file__).parent
    schema = {"reference.py", "wording.py", "override.py", "fields.py"}
    names: set[str] = set()
    for path in package.rglob("*.py"):
        if path.parent.name == "recipe" and path.name in schema:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_every_key_is_read_by_somebody() -> None:
    """A key of the schema that no code reads could have no effect, whatever stands beside it."""
    names = read_names()
    unread = {
        f"{model.__name__}.{name}" for model in (Recipe, *ALL) for name in model.model_fields if name not in names
    }
    assert unread <= READ_AS_A_WHOLE, unread - READ_AS_A_WHOLE


READ_AS_A_WHOLE = {"Dialogue.user", "Dialogue.assistant", "Dialogue.tool"}
"""Keys whose names are data: the marks of a dialogue are looked up by the speaker that they stand for."""


@pytest.mark.parametrize("kind", BUILTIN_STAGES)
def test_every_key_is_part_of_the_identity_or_neutral_for_a_reason(kind: str) -> None:
    """What a stage's result follows from is all of its keys, but for those that are said to change none."""
    stage: type[Stage] = BUILTIN_STAGES[kind]
    given = {
        "sft": SFT,
        "dpo": DPO,
        "reward": REWARD,
        "ppo": PPO,
        "trl": {"kind": "trl", "trainer": "kto", **DATA},
    }.get(kind, {})
    if kind in ("select_prompts", "label"):
        given = {"kind": kind, "reward": "./model", "prompts": "rows.jsonl"}
    elif kind in ("self_contrast", "evaluate"):
        given = {"kind": kind, **DATA, **({"policies": ["./model"]} if kind == "evaluate" else {})}
    spec = stage.model_validate(given)
    config = normalised(spec)
    neutral = {*NEUTRAL, *spec.neutral_keys()}
    for name in stage.model_fields.keys() - {"kind", "seed"}:
        assert name in config or name in neutral, name
        part = getattr(spec, name)
        if isinstance(part, BaseModel) and isinstance(config.get(name), dict):
            for key in type(part).model_fields:
                assert key in config[name] or f"{name}.{key}" in neutral, (name, key)
