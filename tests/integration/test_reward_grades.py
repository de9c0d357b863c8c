"""The reward stage on graded answers, end to end on a tiny model: several attributes, one score, and whoever loads the
folder."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.errors import InputError
from align.models.scalar.classifier import export_classifier
from align.models.scalar.heads import load_scalar, score_notes
from align.pipeline.selection import Selection
from align.preflight.checks import require
from align.recipe.schema import Model
from align.scoring.classifier import ClassifierScorer
from align.scoring.reward_model import RewardModelScorer
from align.scoring.scorer import Answer
from tests.integration.test_reward_stage import recipe, run
from tests.support.saved import save_tiny

WEIGHTS = {"helpfulness": 0.65, "verbosity": -0.4}
TRAIN = {"learning_rate": 3e-3, "batch_size": 4, "microbatch_tokens": 128, "epochs": 4}
SAID = ("Paris", "the fox runs", "today it is nice", "the price is 46", "no", "system user tool")


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """As HelpSteer has them; every fourth has no verbosity."""
    made = []
    for i in range(first, first + count):
        said = SAID[i % len(SAID)]
        long = None if i % 4 == 0 else len(said) / 8
        made.append(
            {
                "prompt": f"Question {i // 2}?",
                "response": said,
                "helpfulness": i % 5,
                "correctness": 1,
                "verbosity": long,
            }
        )
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    for name, some in (("train", rows(24)), ("held", rows(12, 100))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return tmp_path


def graded(**options: Any) -> dict[str, Any]:
    return {
        "kind": "reward",
        "data": "train.jsonl",
        "eval_data": "held.jsonl",
        "grades": WEIGHTS,
        "train": TRAIN,
        **options,
    }


ANSWERS = [Answer(({"role": "user", "content": row["prompt"]},), row["response"]) for row in rows(8, 40)]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "save_merged": True}], ids=["full", "lora"])
def test_from_graded_answers_to_a_reward_model(folder: Path, lora: dict[str, Any] | None) -> None:
    """The errors fall; the folder gives one score, the weighted sum of what transformers' classifier says for each
    attribute; the report has every attribute, and says that another grade of the data is not learned."""
    text = io.StringIO()
    result = run({"reward": graded(lora=lora)}, text)
    summary, place = result.summaries["reward"], result.folder / "stages" / "reward"
    before, after = summary["eval_before"], summary["eval_after"]
    assert after["loss"] < before["loss"] and after["error/helpfulness"] < before["error/helpfulness"]
    held_out = summary["held_out_grades"]
    assert held_out.keys() == {*WEIGHTS, "score"}
    assert [held_out[name]["answers"] for name in held_out] == [12, 9, 9]
    assert held_out["helpfulness"]["error"]["value"] == pytest.approx(after["error/helpfulness"], abs=1e-4)
    assert "24 graded answers" in text.getvalue() and "a grade that is not learned: correctness" in text.getvalue()
    scores = RewardModelScorer(Model(path=str(place))).score(ANSWERS)
    export_classifier(Model(path=str(place)), folder / "plain")
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(folder / "plain").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "plain")
    assert classifier.config.num_labels == 2 and list(classifier.config.id2label.values()) == list(WEIGHTS)
    weights = torch.tensor(list(WEIGHTS.values()))
    for answer, score in zip(ANSWERS, scores, strict=True):
        messages = [*answer.prompt, {"role": "assistant", "content": answer.text}]
        ids = tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n"),
            add_special_tokens=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            attributes = classifier(**ids).logits[0]
        assert float(attributes @ weights) == pytest.approx(score, abs=1e-4)
    own_weights = ClassifierScorer(Model(path=str(folder / "plain")))
    named = ClassifierScorer(Model(path=str(folder / "plain")), grades=WEIGHTS)
    assert own_weights.score(ANSWERS) == named.score(ANSWERS), "its configuration has the weights that it was made with"
    stats = score_notes(Model(path=str(place))).stats
    own = RewardModelScorer(Model(path=str(place))).score(
        [Answer(({"role": "user", "content": row["prompt"]},), row["response"]) for row in rows(24)]
    )
    assert (stats.mean, stats.std, stats.count) == (
        pytest.approx(np.mean(own), abs=1e-4),
        pytest.approx(np.std(own), abs=1e-4),
        24,
    )
    if lora:
        merged = RewardModelScorer(Model(path=str(place / "merged"))).score(ANSWERS)
        assert merged == pytest.approx(scores, abs=1e-4)
    start = load_scalar(Model(path=str(place)))
    assert start.head.weight.shape[0] == 1, "a value model starts from the one score"


def test_a_grade_that_the_data_do_not_have_is_told_before_anything_runs(folder: Path) -> None:
    """With those that they have."""
    loaded = recipe({"reward": graded(grades={**WEIGHTS, "honesty": 1.0})})
    with pytest.raises(
        InputError, match=r"grades\.honesty: no answer has this grade; the data have correctness as well"
    ):
        require(loaded, folder / "runs", nproc=1, selection=Selection())


def test_rows_without_grades_are_told_before_anything_runs(folder: Path) -> None:
    Path("train.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(InputError, match=r"train\.jsonl:1: has no grades; `format:"):
        require(recipe({"reward": graded()}), folder / "runs", nproc=1, selection=Selection())
