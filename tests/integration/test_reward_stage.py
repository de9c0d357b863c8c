"""The reward stage end to end on a tiny model: from preferences to a folder with a head, and a report of what length
had to do with it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from align.data.records import Message
from align.errors import InputError
from align.models.load import load_encoder
from align.models.scalar.heads import score_notes
from align.pipeline.runner import RunResult, run_recipe
from align.pipeline.selection import Selection
from align.planning.plan import make_plan
from align.recipe.load import load_recipe
from align.recipe.schema import Model
from align.scoring.reward_model import RewardModelScorer
from align.scoring.scorer import Answer
from tests.support.readme import every_file_is_explained
from tests.support.report_run import reported
from tests.support.root import ROOT
from tests.support.saved import save_tiny

TRAIN = {"learning_rate": 3e-3, "batch_size": 4, "microbatch_tokens": 128, "epochs": 4}
GOOD, BAD = ("Paris", "the fox runs", "today it is nice"), ("the price is 46", "no", "system user tool")


def rows(count: int, first: int = 0, longer: float = 0.5) -> list[dict[str, Any]]:
    """Preferences of distinct prompts: good words win; in a share ``longer`` of them the winner is the longer
    answer."""
    made = []
    for i in range(first, first + count):
        chosen, rejected = GOOD[i % 3], BAD[(i // 3) % 3]
        pad = " and so on" * (1 + i % 4)
        if (i % 10) < 10 * longer:
            chosen += pad
        else:
            rejected += pad
        made.append({"id": f"r{i}", "prompt": f"Question {i}?", "chosen": chosen, "rejected": rejected})
    return made


def write(name: str, preferences: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in preferences))
    return name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    write("train.jsonl", rows(20))
    write("held.jsonl", rows(10, 100))
    talk = [
        {"messages": [{"role": "user", "content": f"Say {w}."}, {"role": "assistant", "content": f"{w} it is."}]}
        for w in ("tea", "rain")
    ]
    write("talk.jsonl", talk)
    return tmp_path


def recipe(stages: dict[str, Any]) -> Any:
    Path("recipe.yaml").write_text(yaml.safe_dump({"name": "r", "model": "./model", "stages": stages}, sort_keys=False))
    return load_recipe("recipe.yaml")


def run(stages: dict[str, Any], text: io.StringIO | None = None) -> RunResult:
    result = run_recipe(
        recipe(stages), console=Console(file=text or io.StringIO(), width=140), selection=Selection(replace=True)
    )
    every_file_is_explained(result.folder)
    return result


def reward(**options: Any) -> dict[str, Any]:
    return {"kind": "reward", "data": "train.jsonl", "eval_data": "held.jsonl", "train": TRAIN, **options}


def report(result: RunResult, stage: str = "reward") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.folder / "stages" / stage / "report.json").read_text())
    return found


def scores_of(
    result: RunResult, preferences: list[dict[str, Any]], stage: str = "reward", **options: Any
) -> list[float]:
    """All answers of some rows, by the saved model."""
    scorer = RewardModelScorer(Model(path=str(result.folder / "stages" / stage)), **options)
    prompts: list[tuple[Message, ...]] = [({"role": "user", "content": row["prompt"]},) for row in preferences]
    return scorer.score(
        [Answer(p, row[side]) for p, row in zip(prompts, preferences, strict=True) for side in ("chosen", "rejected")]
    )


def test_from_preferences_to_a_reward_model(folder: Path) -> None:
    """sft, then reward from it: it learns, the folder scores in another process's terms what the report says, and a
    rerun does nothing."""
    text = io.StringIO()
    sft = {"kind": "sft", "data": "talk.jsonl", "samples": 0, "train": {**TRAIN, "epochs": 1}}
    result = run({"sft": sft, "reward": reward(init="stage:sft")}, text)
    summary = result.summaries["reward"]
    assert result.ran == ("sft", "reward")
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"] - 0.1
    assert summary["eval_after"]["accuracy"] >= 0.9
    scores = np.array(scores_of(result, rows(10, 100))).reshape(-1, 2)
    natural = summary["held_out"]["natural"]
    assert (scores[:, 0] > scores[:, 1]).mean() == pytest.approx(natural["accuracy"]["value"])
    assert natural["accuracy"]["low"] <= natural["accuracy"]["value"] <= natural["accuracy"]["high"]
    assert natural["score_mean"]["value"] == pytest.approx(scores.mean(), abs=1e-4)
    assert natural["score_std"]["value"] == pytest.approx(scores.std(), abs=1e-4)
    assert natural["pairs"] == 10 and summary["held_out"]["length_balanced"]["pairs"] <= 10
    assert {"accuracy_length", "accuracy_words", "calibration_error", "length_correlation"} <= natural.keys()
    accuracy = reported(result.folder)["reward"]["held-out accuracy"].after
    assert accuracy is not None and vars(accuracy) == natural["accuracy"]
    shown = text.getvalue()
    for words in (
        "held-out data, with 95 % intervals",
        "accuracy of words alone (TF-IDF)",
        "where the shorter answer wins",
        "20 preferences",
    ):
        assert words in shown
    assert run({"sft": sft, "reward": reward(init="stage:sft")}).up_to_date == ("sft", "reward")


def test_normalised_scores_on_the_training_answers(folder: Path) -> None:
    """Mean 0, standard deviation 1 on what the statistics are of, from the artefact alone; and they are the
    manifest's."""
    result = run({"reward": reward()})
    raw, normalised = (np.array(scores_of(result, rows(20), normalise=flag)) for flag in (False, True))
    assert normalised.mean() == pytest.approx(0, abs=1e-3) and normalised.std() == pytest.approx(1, abs=1e-3)
    stats = score_notes(Model(path=str(result.folder / "stages" / "reward"))).stats
    assert (stats.mean, stats.std, stats.count) == (
        pytest.approx(raw.mean(), abs=1e-4),
        pytest.approx(raw.std(), abs=1e-4),
        40,
    )
    assert result.summaries["reward"]["scores"] == vars(stats)


@pytest.mark.parametrize("lora", [{"rank": 4, "save_merged": True}, {"rank": 4}], ids=["lora", "lora on lora"])
def test_adapters(folder: Path, lora: dict[str, Any]) -> None:
    """An adapter with its head, on the model or on a policy that is an adapter; merged it scores the same."""
    stages: dict[str, Any] = {"reward": reward(lora=lora)}
    if "save_merged" not in lora:
        taught = {
            "kind": "sft",
            "data": "talk.jsonl",
            "samples": 0,
            "lora": {"rank": 2},
            "train": {**TRAIN, "epochs": 1},
        }
        stages = {"sft": taught, "reward": reward(init="stage:sft", lora=lora)}
    result = run(stages)
    summary = result.summaries["reward"]
    assert summary["format"] == "lora" and summary["eval_after"]["accuracy"] > summary["eval_before"]["accuracy"] - 0.01
    held_out = np.array(scores_of(result, rows(10, 100))).reshape(-1, 2)
    assert (held_out[:, 0] > held_out[:, 1]).mean() == pytest.approx(
        summary["held_out"]["natural"]["accuracy"]["value"]
    )
    if "save_merged" in lora:
        merged = RewardModelScorer(Model(path=str(result.folder / "stages" / "reward" / "merged")))
        (score,) = merged.score([Answer(({"role": "user", "content": "Question 100?"},), rows(1, 100)[0]["chosen"])])
        assert score == pytest.approx(held_out[0, 0], abs=1e-4)
        assert summary["merged"]["max_abs_score_diff"] < 1e-4


def test_full_training_on_an_adapter_policy(folder: Path) -> None:
    taught = {"kind": "sft", "data": "talk.jsonl", "samples": 0, "lora": {"rank": 2}, "train": {**TRAIN, "epochs": 1}}
    result = run({"sft": taught, "reward": reward(init="stage:sft")})
    assert result.summaries["reward"]["format"] == "full"
    held_out = np.array(scores_of(result, rows(10, 100))).reshape(-1, 2)
    assert (held_out[:, 0] > held_out[:, 1]).mean() == pytest.approx(
        result.summaries["reward"]["held_out"]["natural"]["accuracy"]["value"]
    )


def test_length_that_decides_is_told(folder: Path) -> None:
    """Where the longer answer always wins, length alone gets everything right, and the report says so in words."""
    write("train.jsonl", rows(20, longer=1.0))
    write("held.jsonl", rows(10, 100, longer=1.0))
    text = io.StringIO()
    result = run({"reward": reward()}, text)
    natural = result.summaries["reward"]["held_out"]["natural"]
    assert natural["accuracy_length"]["value"] == 1.0 and natural["accuracy_shorter_wins"] is None
    assert "the longer answer wins 100% of the training pairs" in text.getvalue()
    assert result.summaries["reward"]["warnings"]
    with pytest.raises(InputError, match="length balancing leaves no pair"):
        run({"reward": reward(length_balance=True)})
    quiet = run({"reward": {**reward(), "data": write("even.jsonl", rows(20))}})
    assert "warnings" not in quiet.summaries["reward"]


def test_length_balance_trains_on_what_it_says(folder: Path) -> None:
    """The longer answer wins 16 of 20 pairs: an epoch has twice the minority of each bucket, the plan knows that, and a
    table shows it."""
    write("train.jsonl", rows(20, longer=0.8))
    spec = reward(length_balance=True, train={**TRAIN, "batch_size": 2, "epochs": 2})
    planned = {row.name: row.value for row in make_plan(recipe({"reward": spec})).stages[0].rows}
    text = io.StringIO()
    result = run({"reward": spec}, text)
    buckets = report(result)["length_balance"]
    used = sum(bucket["used"] for bucket in buckets)
    assert sum(bucket["longer_wins"] for bucket in buckets) == 16
    assert sum(bucket["shorter_wins"] + bucket["equal"] for bucket in buckets) == 4
    assert 4 < used == sum(2 * min(b["longer_wins"], b["shorter_wins"]) + b["equal"] for b in buckets) < 20
    assert result.summaries["reward"]["steps"] == used and planned["steps"] == str(used)
    assert planned["tokens in all"] == f"{result.summaries['reward']['tokens']:,}"
    assert "pairs by difference in length" in text.getvalue() and "left out" in text.getvalue()
    assert "length may be what was learned" not in text.getvalue(), "which is what the balance is for"


def test_filters_are_on_and_can_be_switched_off(folder: Path) -> None:
    """A held-out prompt in the training file is left out with its id, and so is a contradiction; `filters: false`
    trains on all."""
    leaked, contradiction = rows(1, 100)[0], {**rows(1)[0], "id": "other"}
    contradiction["chosen"], contradiction["rejected"] = contradiction["rejected"], contradiction["chosen"]
    write("train.jsonl", [*rows(20), {**leaked, "id": "leak"}, contradiction])
    result = run({"reward": reward()})
    dropped = {reason: entry["total"] for reason, entry in report(result)["data"]["dropped"].items()}
    assert sorted(dropped.values()) == [1, 2]
    lines = [
        json.loads(line) for line in (result.folder / "stages" / "reward" / "rejects.jsonl").read_text().splitlines()
    ]
    assert {line["id"] for line in lines} == {"leak", "other", "r0"}
    assert report(run({"reward": reward(filters=False)}))["data"]["dropped"] == {}


def test_without_held_out_data(folder: Path) -> None:
    spec = reward()
    del spec["eval_data"]
    result = run({"reward": spec})
    assert result.summaries["reward"]["held_out"] is None and result.summaries["reward"]["scores"]["count"] == 40


def test_a_reward_model_is_no_policy(folder: Path) -> None:
    with pytest.raises(InputError, match="`reward` makes a reward model, a policy is wanted here"):
        recipe({"reward": reward(), "dpo": {"kind": "dpo", "policy": "stage:reward", "data": "train.jsonl"}})


def test_the_plan_of_a_reward_model(folder: Path) -> None:
    """It starts from `init`, has neither logits nor an LM head to train, and says how many steps it takes."""
    sft = {"kind": "sft", "data": "talk.jsonl", "train": TRAIN}
    stages = make_plan(recipe({"sft": sft, "reward": reward(init="stage:sft")})).stages
    plans = {stage.name: {row.name.strip(): row for row in stage.rows} for stage in stages}
    assert plans["reward"]["starts from"].value == "stage:sft <- ./model"
    assert plans["reward"]["starts from"].source == "stages.reward.init"
    assert "logits" in plans["sft"] and not {"logits", "LM head gradient"} & plans["reward"].keys()
    assert plans["reward"]["steps"].value == "20"


def test_template_digest_is_in_the_manifest(folder: Path) -> None:
    result = run({"reward": reward()})
    manifest = json.loads((result.folder / "stages" / "reward" / "manifest.json").read_text())
    assert (
        manifest["type"] == "reward_model"
        and manifest["encoder"] == load_encoder(Model(path=str(folder / "model"))).digest
    )


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path) -> None:
    """The same held-out numbers and statistics, though each process scores only its share."""
    spec = {"reward": reward(train={**TRAIN, "epochs": 1})}
    one = run(spec)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "align", "--runs-dir", "two", "run", "recipe.yaml", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = json.loads((Path("two") / "r" / "stages" / "reward" / "report.json").read_text())
    ours = report(one)
    for key in ("mean", "std", "count"):
        assert ours["scores"][key] == pytest.approx(theirs["scores"][key], abs=1e-5)
    for name in ("accuracy", "score_mean", "length_correlation", "accuracy_words"):
        assert ours["held_out"]["natural"][name] == pytest.approx(theirs["held_out"]["natural"][name], abs=1e-4)
