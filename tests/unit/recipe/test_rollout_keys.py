"""The `rollout` block: each engine has its own keys, a key of another one is a mistake, and what was made before that is
found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import InputError
from align.pipeline.artifacts import Identity
from align.pipeline.identity import as_of_now, identify, normalised
from align.recipe.blocks.rollout import CHOICES, ENGINES, AutoRollout, Rollout, VllmRollout, engine_alone
from align.recipe.load import load_recipe
from align.recipe.schema import BUILTIN_STAGES, PpoStage, Stage

VLLM = {"dtype": "bf16", "own_process": True, "cache_gb": 1.5, "max_sequences": 2}
OWN_KEYS: dict[str, dict[str, Any]] = {
    "auto": VLLM,
    "vllm": VLLM,
    "transformers": {},
    "scripted": {"script": "rows.jsonl"},
}
PPO = {"kind": "ppo", "reward": "./model", "prompts": "rows.jsonl"}
STAGES: dict[str, dict[str, Any]] = {
    "ppo": PPO,
    "label": {**PPO, "kind": "label"},
    "select_prompts": {**PPO, "kind": "select_prompts"},
    "self_contrast": {"kind": "self_contrast", "data": "rows.jsonl", "embedder": "./model"},
    "evaluate": {"kind": "evaluate", "policies": ["./model"], "data": "rows.jsonl"},
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("rows.jsonl").write_text("")


def stage(kind: str, rollout: dict[str, Any] | None = None) -> Stage:
    given = STAGES[kind] if rollout is None else {**STAGES[kind], "rollout": rollout}
    return BUILTIN_STAGES[kind].model_validate(given)


def written(rollout: Any) -> str:
    """A recipe with the block; its keys begin at line 9."""
    recipe = {"name": "r", "model": "./model", "stages": {"it": {**PPO, "rollout": rollout}}}
    Path("r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return "r.yaml"


def problems(rollout: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_recipe(written(rollout))
    return [str(problem) for problem in caught.value.problems]


# Keys


def test_every_engine_has_a_case_here() -> None:
    assert OWN_KEYS.keys() == CHOICES.keys()
    for name, kind in CHOICES.items():
        assert OWN_KEYS[name].keys() == kind.model_fields.keys() - {"engine"}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", STAGES)
def test_an_engine_takes_its_own_keys_in_every_stage(kind: str, name: str) -> None:
    found = stage(kind, {"engine": name, **OWN_KEYS[name]})
    rollout = getattr(found, "rollout")  # noqa: B009 - each of these kinds has one
    assert type(rollout) is CHOICES[name]
    assert {key: getattr(rollout, key) for key in OWN_KEYS[name]} == OWN_KEYS[name]
    assert type(stage(kind).rollout) is AutoRollout  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "owner", "key"),
    [
        (name, owner, key)
        for name in CHOICES
        for owner in ENGINES
        for key in OWN_KEYS[owner]
        if key not in OWN_KEYS[name]
    ],
)
def test_a_key_of_another_engine_is_refused_at_its_place_naming_both(name: str, owner: str, key: str) -> None:
    block = {"engine": name, **OWN_KEYS[name], key: OWN_KEYS[owner][key]}
    place = f"r.yaml:{9 + list(block).index(key)}:7 stages.it.rollout.{key}"
    assert problems(block) == [f"{place}: has no effect with engine: {name}; it is {owner}'s"]


def test_all_keys_of_other_engines_are_told_at_once() -> None:
    assert len(problems({"engine": "transformers", **VLLM, "script": "rows.jsonl"})) == 5
    for nothing in (None, False):
        load_recipe(written({"engine": "transformers", "own_process": nothing, "dtype": None, "script": ""}))


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (
            {"engine": "vlm"},
            "r.yaml:9:15 stages.it.rollout.engine: must be one of auto, vllm, transformers, scripted; got the text"
            " `vlm`; did you mean `vllm`?",
        ),
        (
            {"engine": 3},
            "r.yaml:9:15 stages.it.rollout.engine: must be one of auto, vllm, transformers, scripted; got the number"
            " `3`",
        ),
        (
            {"engine": "scripted"},
            "r.yaml:9:7 stages.it.rollout: engine: scripted needs a `script`, and no other engine takes one",
        ),
        (
            {"engine": "vllm", "cach_gb": 1},
            "r.yaml:10:7 stages.it.rollout.cach_gb: unknown key; did you mean `cache_gb`?",
        ),
        (
            {"engine": "transformers", "temperature": 1},
            "r.yaml:10:7 stages.it.rollout.temperature: unknown key; known keys: engine",
        ),
        (
            {"engine": "vllm", "cache_gb": 0},
            "r.yaml:10:17 stages.it.rollout.cache_gb: must be greater than 0, got the number `0`",
        ),
        (
            {"dtype": "fp8"},
            "r.yaml:9:14 stages.it.rollout.dtype: must be one of fp32, bf16; got the text `fp8`",
        ),
        ("vllm", "r.yaml:8:14 stages.it.rollout: expected a mapping; got the text `vllm`"),
        (None, "r.yaml:8:14 stages.it.rollout: expected a mapping; got nothing"),
    ],
)
def test_mistakes_are_told_where_they_stand(rollout: Any, message: str) -> None:
    assert problems(rollout) == [message]


def test_a_script_is_a_reference() -> None:
    assert problems({"engine": "scripted", "script": "gone.jsonl"})[0].startswith(
        "r.yaml:10:15 stages.it.rollout.script: no such file or folder: gone.jsonl"
    )


# What results and samples follow from

AS_BEFORE = {
    "engine": "auto",
    "dtype": None,
    "own_process": None,
    "cache_gb": None,
    "max_sequences": 128,
    "script": None,
}
"""The block as it was written while it had the keys of all engines."""


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("kind", STAGES)
def test_a_result_of_the_time_of_one_block_is_up_to_date(kind: str, name: str) -> None:
    spec = stage(kind, {"engine": name, **OWN_KEYS[name]})
    old = {**AS_BEFORE, "engine": name, **OWN_KEYS[name]}
    assert spec.rollout.model_dump(mode="json") == old  # type: ignore[attr-defined]
    config = {**spec.model_dump(mode="json", exclude={"kind", "seed"}), "rollout": old}
    identity = Identity(kind, config, 17, None, {})
    assert as_of_now(identity, spec).config == normalised(spec)


def test_only_what_changes_samples_is_in_the_identity_of_ppo() -> None:
    kept = {"engine": "vllm", "dtype": None, "max_sequences": 128, "script": None}
    assert normalised(stage("ppo", {"engine": "vllm", "own_process": True, "cache_gb": 3.0}))["rollout"] == kept
    changed = VllmRollout(engine="vllm", cache_gb=3.0, max_sequences=4).without_neutral()
    assert changed == VllmRollout(engine="vllm", max_sequences=4)


@pytest.mark.parametrize("installed", [True, False])
def test_auto_is_another_engine_once_vllm_is_there(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.recipe.blocks.rollout.find_spec", lambda name: object() if installed else None)
    auto = AutoRollout(dtype="bf16", max_sequences=4)
    chosen = auto.chosen()
    assert chosen == (VllmRollout(engine="vllm", dtype="bf16", max_sequences=4) if installed else chosen)
    assert chosen.engine == ("vllm" if installed else "transformers")
    block = {**AS_BEFORE, "dtype": "bf16", "max_sequences": 4}
    assert auto.identity() == {"rollout": block, "vllm": installed}
    assert chosen.identity() == {"rollout": chosen.model_dump(mode="json")} and chosen.chosen() is chosen


def test_a_log_prob_weight_has_no_effect_where_there_is_nothing_to_weight() -> None:
    exact = [name for name, kind in ENGINES.items() if kind.exact]
    assert exact == ["transformers"]
    with pytest.raises(ValueError, match=r"has no effect with rollout\.engine: transformers, whose log-probs are"):
        PpoStage.model_validate({**PPO, "importance_cap": 2.0, "rollout": {"engine": "transformers"}})


def test_engines_by_their_name_alone() -> None:
    found = {name: engine_alone(name) for name in (*CHOICES, "vlm", "own:Engine")}
    assert {name for name, rollout in found.items() if rollout is not None} == {"auto", "vllm", "transformers"}
    assert found["auto"] == AutoRollout()


# A third party's

OWN = """
from typing import ClassVar
from align.recipe.schema import Rollout

class Echo(Rollout):
    opens: ClassVar[str] = "own_engine:opened"
    follows_policy: ClassVar[bool] = False
    times: int = 1

class NotOne:
    pass

class Unopened(Rollout):
    pass
"""


def test_a_third_partys_engine_has_keys_of_its_own_and_counts_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_engine.py").write_text(OWN)
    loaded = load_recipe(written({"engine": "own_engine:Echo", "times": 3}))
    rollout: Any = loaded.recipe.stages["it"].rollout  # type: ignore[attr-defined]
    assert isinstance(rollout, Rollout) and rollout.times == 3 and rollout.precision("cpu") is None
    one = identify(loaded, "it", lambda text: "x")
    assert one.config["rollout"] == {"engine": "own_engine:Echo", "times": 3} == json.loads(rollout.model_dump_json())
    assert "code:own_engine" in one.inputs
    assert problems({"engine": "own_engine:Echo", "tims": 3})[0].startswith(
        "r.yaml:10:7 stages.it.rollout.tims: unknown key"
    )
    assert problems({"engine": "own_engine:Echo", "dtype": "bf16"}) == [
        "r.yaml:10:7 stages.it.rollout.dtype: has no effect with engine: own_engine:Echo; it is vllm's"
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_engine:NotOne", "`own_engine:NotOne` is not a subclass of align.recipe.schema.Rollout"),
        ("own_engine:Unopened", "`own_engine:Unopened` needs a class variable `opens`, written module:function"),
        ("own_engine:Gone", "the module own_engine has no `Gone`"),
        ("nowhere:Engine", "cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_what_is_no_engine_is_refused_at_its_name(name: str, message: str) -> None:
    Path("own_engine.py").write_text(OWN)
    assert problems({"engine": name})[0].startswith(f"r.yaml:9:15 stages.it.rollout.engine: {message}")
