"""What a run may not do to what is finished, and what it says of what is not: results are replaced only by
`--replace`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align import files
from align.errors import InputError
from align.pipeline import artifacts
from align.pipeline.folder import RunFolder
from align.pipeline.identity import as_of_now, explain, left_as_it_was, neutral_values, normalised
from align.pipeline.selection import Selection
from align.planning.plan import make_plan
from align.recipe.schema import BUILTIN_STAGES, Stage, stage_class
from tests.support.workshop import RECIPE, Workshop, snapshot

NO = Selection()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Workshop:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Workshop(tmp_path, re.sub(r"\W", "_", request.node.name))


def results(shop: Workshop) -> dict[str, tuple[int, bytes]]:
    return snapshot(shop.folder / "stages")


@pytest.mark.parametrize(
    ("overrides", "stage", "reason"),
    [
        (["stages.sft.seed=3"], "sft", "config changed: seed 17 -> 3"),
        (["stages.last.train.learning_rate=1.0"], "last", "config changed: train.learning_rate 1e-5 -> 1.0"),
        (["model=other"], "sft", "config changed: model.path base -> other"),
    ],
)
def test_other_settings_replace_nothing(shop: Workshop, overrides: list[str], stage: str, reason: str) -> None:
    """One line that says what changed; the result and the recipe that made it are as before; `--replace` does it."""
    (shop.root / "other").mkdir()
    (shop.root / "other" / "config.json").write_text("{ }")
    shop.run()
    before, recipe = results(shop), (shop.folder / "recipe.yaml").read_text()
    expected = re.escape(f"stages.{stage}: a finished result is there that was made otherwise ({reason}")
    with pytest.raises(InputError, match=expected) as caught:
        shop.run(*overrides, selection=NO)
    assert "--replace makes it anew" in str(caught.value) and len(caught.value.problems) == 1
    assert (results(shop), (shop.folder / "recipe.yaml").read_text()) == (before, recipe)
    assert shop.run(*overrides, selection=Selection(replace=True))[0].ran[0] == stage


def test_other_content_replaces_nothing(shop: Workshop) -> None:
    """Data and models count by content, which is looked at when the stage's turn comes."""
    shop.run()
    before = results(shop)
    (shop.root / "b.jsonl").write_text("changed\n")
    with pytest.raises(InputError, match=r"stages.dpo: a finished result .* \(input b.jsonl changed\)"):
        shop.run(selection=NO)
    assert results(shop) == before
    assert shop.run(selection=Selection(replace=True))[0].ran == ("dpo", "last")


def test_what_settings_tell_is_told_before_anything_runs(shop: Workshop) -> None:
    """All of it at once: a first stage that takes a day does not run for a last one that must not."""
    shop.run()
    files.remove_folder(shop.folder / "stages" / "sft")
    before = shop.events()
    with pytest.raises(InputError) as caught:
        shop.run("stages.dpo.seed=1", "stages.last.seed=1", selection=NO)
    assert [str(problem).split(": ")[0].split(" ")[-1] for problem in caught.value.problems] == [
        "stages.dpo",
        "stages.last",
    ]
    assert shop.events() == before


def test_the_plan_says_so(shop: Workshop) -> None:
    shop.run()
    reason = "to run: config changed: seed 17 -> 3; refused without --replace"
    assert shop.status("stages.last.seed=3", replace=False)["last"] == reason
    assert shop.status("stages.last.seed=3")["last"] == "to run: config changed: seed 17 -> 3"
    plan = make_plan(shop.load("stages.last.seed=3"), shop.runs)
    assert plan.stages[-1].status.refused


def test_mending_a_kind_makes_its_results_anew_and_no_others(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.run()
    kind = f"{shop.module}:Other"
    monkeypatch.setattr(stage_class(kind), "version", 2)
    reason = f"made by version 1 of the kind {kind}, which is at version 2"
    assert shop.status() == {
        "sft": "up to date: ",
        "dpo": f"to run: {reason}",
        "last": "waits: dpo to run first",
    }
    with pytest.raises(InputError, match=re.escape(reason)):
        shop.run(selection=NO)
    assert shop.run()[0].ran == ("dpo",)
    assert set(shop.status().values()) == {"up to date: "}


def test_force_makes_a_result_again_and_no_other_in_its_place(shop: Workshop) -> None:
    shop.run()
    assert shop.run(selection=Selection(force=["sft"]))[0].ran == ("sft",)
    with pytest.raises(InputError, match="--replace"):
        shop.run("stages.sft.seed=3", selection=Selection(force=["sft"]))
    with pytest.raises(InputError, match="--replace"):
        shop.run("stages.sft.seed=3", selection=Selection(fresh=True))


def test_a_damaged_result_is_no_finished_one(shop: Workshop) -> None:
    shop.run()
    (shop.folder / "stages" / "sft" / "config.json").write_text("{}")
    assert shop.run(selection=NO)[0].ran == ("sft",)


@pytest.mark.parametrize("stages", ["one other stage", "the same stage"])
def test_two_recipes_with_one_name(shop: Workshop, stages: str) -> None:
    """Neither takes the other's results, nor its folder."""
    shop.run()
    before = snapshot(shop.folder)
    name = "sft" if stages == "the same stage" else "kto"
    shop.recipe(text=f'name: toy\nmodel: base\nstages:\n  {name}: {{{{kind: "{{module}}:Other", data: b.jsonl}}}}\n')
    expected = (
        "kind changed"
        if name == "sft"
        else r"recipe.yaml:1:1 name: .*toy holds the results of another recipe \(stages: dpo, last"
    )
    with pytest.raises(InputError, match=expected):
        shop.run(selection=NO)
    assert snapshot(shop.folder) == before
    assert shop.run(selection=Selection(replace=True))[0].ran == (name,)


def test_a_recipe_may_lose_and_gain_stages(shop: Workshop) -> None:
    shop.run()
    shop.recipe(
        text="\n".join(RECIPE.splitlines()[:-1])
        + '\n  more: {{kind: "{module}:Toy", policy: "stage:dpo", data: b.jsonl}}\n'
    )
    assert shop.run(selection=NO)[0].ran == ("more",)


def test_unfinished_attempts_are_told_of_when_they_go(shop: Workshop) -> None:
    for seed in (8, 9):
        with pytest.raises(RuntimeError):
            shop.run("stages.sft.fail=once", f"stages.sft.seed={seed}", selection=NO)
    work = next((shop.folder / "work" / "sft").iterdir())
    (work / "checkpoints" / "step-00000040").mkdir(parents=True)
    _, lines = shop.run(selection=NO)
    told = sorted(line for line in lines if "unfinished" in line)
    end = "goes once this one is finished"
    assert told == [
        f"sft: an unfinished attempt with other settings or inputs ({left}) {end}"
        for left in ("no checkpoint", "step 40")
    ]
    assert list((shop.folder / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("left", "checkpoints", "words"),
    [
        ([], True, ""),
        (["metrics.jsonl"], True, "starting again (no checkpoint was left)"),
        (["metrics.jsonl"], False, "going on from an earlier attempt"),
        (["checkpoints/step-00000007/x", "checkpoints/step-00000120/x"], True, "going on from step 120"),
        (["trl/checkpoint-9/manifest.json", "trl/checkpoint-12/half"], True, "going on from step 9"),
        (["checkpoints/.tmp-1-2/x"], True, "starting again (no checkpoint was left)"),
    ],
)
def test_going_on_is_said_only_of_what_is_gone_on_from(
    shop: Workshop, left: list[str], checkpoints: bool, words: str
) -> None:
    shop.run()
    run = RunFolder.of(shop.load(), shop.runs)
    identity = artifacts.read_manifest(run.stage("sft")).identity
    for name in left:
        path = run.work("sft", identity) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert run.left("sft", identity, checkpoints=checkpoints) == words


def test_a_mistake_in_the_first_stage_leaves_no_folder(shop: Workshop) -> None:
    """But a failure that a person may want to look at does."""
    shop.recipe(text=RECIPE.replace(":Toy", ":Lost"))
    with pytest.raises(InputError):
        shop.run(selection=NO)
    assert not shop.runs.exists()
    shop.recipe(sft=", fail: always")
    with pytest.raises(RuntimeError):
        shop.run(selection=NO)
    assert shop.events()[-1] == ("sft", "failed")


@pytest.mark.parametrize("place", [".cache", ".cache/samples", "toy", "toy/stages", "toy/work", "toy/history.jsonl"])
def test_nothing_is_written_through_a_link(shop: Workshop, place: str) -> None:
    outside = shop.root / "outside"
    outside.mkdir()
    shop.run(selection=Selection(only=["sft"]))
    path = shop.runs / place
    if path.is_dir():
        files.remove_folder(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside / "file" if place.endswith("jsonl") else outside)
    with pytest.raises(InputError, match="leads out of"):
        shop.run(selection=NO)
    assert list(outside.iterdir()) == []


# Settings that change no result

GIVEN: dict[str, dict[str, Any]] = {
    "sft": {"data": "a.jsonl", "eval_data": "b.jsonl", "lora": {}},
    "dpo": {"data": "a.jsonl", "eval_data": "b.jsonl", "lora": {}},
    "reward": {"data": "a.jsonl", "eval_data": "b.jsonl", "lora": {}},
    "ppo": {
        "prompts": "a.jsonl",
        "eval_prompts": "b.jsonl",
        "reward": "./rm",
        "lora": {},
        "rollout": {"engine": "vllm"},
    },
    "trl": {"data": "a.jsonl", "eval_data": "b.jsonl", "trainer": "kto", "lora": {}},
}
CHANGES = {
    "train.microbatch_tokens": 256,
    "train.layout": "padded",
    "train.gradient_checkpointing": True,
    "train.eval_steps": 7,
    "train.save_steps": 5,
    "train.save_total_limit": 9,
    "train.report_to": ["tensorboard"],
    "lora.save_merged": True,
    "samples": 0,
    "rollout.cache_gb": 1.5,
    "rollout.own_process": True,
    "args.save_steps": 3,
    "args.save_total_limit": 3,
    "args.logging_steps": 3,
    "args.gradient_checkpointing": True,
}


def spec_of(kind: str, key: str | None = None, value: Any = None, **more: Any) -> Stage:
    settings = json.loads(json.dumps({"kind": kind, **GIVEN[kind], **more}))
    if key is not None:
        *parents, last = key.split(".")
        part = settings
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return BUILTIN_STAGES[kind].model_validate(settings)


@pytest.mark.parametrize("kind", GIVEN)
def test_memory_saving_and_accounts_are_no_part_of_the_identity(kind: str) -> None:
    """And all that is neutral is tried here, so that none is by accident."""
    plain = spec_of(kind)
    keys = {
        key
        for key in CHANGES
        if key.partition(".")[0] in type(plain).model_fields and (kind == "ppo" or "rollout" not in key)
    }
    for key in keys:
        assert normalised(spec_of(kind, key, CHANGES[key])) == normalised(plain), key
        assert neutral_values(spec_of(kind, key, CHANGES[key]))[key] == CHANGES[key]
    for key in ("learning_rate", "weight_decay", "adam_beta2"):
        if kind != "trl":
            assert normalised(spec_of(kind, f"train.{key}", 0.5)) != normalised(plain)


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "ppo"])
@pytest.mark.parametrize("selecting", [{"load_best_model": True}, {"early_stopping_patience": 2}])
def test_evaluations_that_choose_the_weights_count(kind: str, selecting: dict[str, Any]) -> None:
    one, other = (spec_of(kind, train={"eval_steps": steps, **selecting}) for steps in (3, 4))
    assert normalised(one) != normalised(other)


def test_a_result_of_the_time_when_they_counted_is_up_to_date(shop: Workshop) -> None:
    plain = spec_of("sft")
    old = artifacts.Identity("sft", plain.model_dump(mode="json", exclude={"kind", "seed"}), 17, None, {})
    assert as_of_now(old, plain).config == normalised(plain)


def _without(value: Any, depth: int = 0) -> Iterator[Any]:
    """Copies of a dump, each without one of its keys, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(value, dict) and depth:  # a stage's own keys come with a kind, whose schema version counts them
            yield {name: other for name, other in value.items() if name != key}
        for smaller in _without(item, depth + 1):
            yield {**value, key: smaller} if isinstance(value, dict) else [*value[:key], smaller, *value[key + 1 :]]


@pytest.mark.parametrize("kind", GIVEN)
def test_a_key_that_a_later_version_adds_makes_no_result_anew(kind: str) -> None:
    """A result that was made before some key existed is one with its default, at any depth."""
    spec = spec_of(kind)
    whole = normalised(spec)
    olds = list(_without(whole))
    filled = [as_of_now(artifacts.Identity(kind, old, 17, None, {}), spec).config for old in olds]
    needed = [old for old, new in zip(olds, filled, strict=True) if new != whole]
    assert len(olds) > 20 and len(needed) <= len(olds) / 4, "only what a recipe has to say itself is missed"
    assert as_of_now(artifacts.Identity(kind, {**whole, "gone": 1}, 17, None, {}), spec).config != whole


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"data": ["a.jsonl", "b.jsonl"]}, {"data": "a.jsonl"}, "data.1 b.jsonl -> absent"),
        ({"data": "a.jsonl"}, {"data": ["a.jsonl", {"path": "b.jsonl", "limit": 2}]}, "data.1 absent -> b.jsonl"),
        (
            {"data": ["a.jsonl", "b.jsonl", "c.jsonl"]},
            {"data": "c.jsonl"},
            "data.0.path a.jsonl -> c.jsonl, data.1 b.jsonl -> absent, data.2",
        ),
        ({"eval_data": None}, {"eval_data": "b.jsonl"}, "eval_data null -> [b.jsonl]"),
        ({"lora": None}, {"lora": {"rank": 4}}, "lora null -> {rank: 4, "),
        (
            {"data": {"path": "a.jsonl", "columns": {"prompt": "q", "completion": "a"}}},
            {"data": "a.jsonl"},
            "data.0.columns {prompt: q, ",
        ),
    ],
)
def test_a_reason_names_what_changed_and_nothing_else(
    before: dict[str, Any], after: dict[str, Any], words: str
) -> None:
    """What is at its default, or absent, before and after is no change; a source or a group of keys that came or went
    is one."""
    one, other = (
        artifacts.Identity("sft", normalised(spec_of("sft", **keys)), 17, None, {}) for keys in (before, after)
    )
    said = explain(as_of_now(one, spec_of("sft", **after)), other)
    assert said.startswith(f"config changed: {words}") and "null -> absent" not in said and "more" not in said


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "lora.save_merged",
            True,
            "lora.save_merged false -> true trains nothing: `align merge` makes the merged copy",
        ),
        ("samples", 0, "samples 2 -> 0 trains nothing: its report keeps the answers that it has"),
        ("train.eval_steps", 5, "train.eval_steps null -> 5 trains nothing: its curves keep the points that they have"),
        ("train.microbatch_tokens", 64, ""),
    ],
)
def test_who_waits_for_something_is_told_where_to_get_it(key: str, value: Any, words: str) -> None:
    assert left_as_it_was(neutral_values(spec_of("sft")), neutral_values(spec_of("sft", key, value))) == words
