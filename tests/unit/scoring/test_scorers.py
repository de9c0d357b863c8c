"""Scorers other than models: a user's own function, ensembles, what a recipe's block opens, and scores that survive an
interruption."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from align.errors import InputError, Interrupted
from align.recipe.blocks.scoring import Scoring
from align.scoring import stored
from align.scoring.ensemble import MemberScorer
from align.scoring.function import CalledScorer
from align.scoring.open import open_scorer
from align.scoring.scorer import Answer, Scorer, require_scores
from align.scoring.stored import score_answers
from align.training.launch import Ranks
from tests.support.root import ROOT

ANSWERS = [Answer(({"role": "user", "content": "?"},), text) for text in ("a", "bb", "ccc")]


class Fixed:
    def __init__(self, name: str, *scores: float) -> None:
        self.name, self.scores = name, scores

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return list(self.scores[: len(answers)])


def opened(block: Any, **options: Any) -> Scorer:
    return open_scorer(TypeAdapter(Scoring).validate_python(block), **{"resolve": Path, **options})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module outside the package, in the user's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path / "my_rewards.py"


# A user's own function


def test_a_function_from_outside_the_package(module: Path) -> None:
    """Any sequence of numbers will do: NumPy's array too."""
    module.write_text("import numpy\ndef length(answers):\n    return numpy.array([len(a.text) for a in answers])\n")
    scorer = opened("my_rewards:length")
    assert scorer.name == "my_rewards:length"
    assert scorer.score(ANSWERS) == [1.0, 2.0, 3.0]
    assert scorer.score([]) == []


def test_the_function_of_the_documentation(module: Path) -> None:
    """docs/scoring.md: an answer that ends and has the row's `answer` in it is the best; words cost."""
    found = re.search(
        r"<!-- example: my_rewards.py -->\n```python\n(.*?)```", (ROOT / "docs" / "scoring.md").read_text(), re.DOTALL
    )
    assert found
    module.write_text(found.group(1))
    prompt = ANSWERS[0].prompt
    answers = [
        Answer(prompt, "It is 42", fields={"answer": "42"}),
        Answer(prompt, "It is 41", fields={"answer": "42"}),
        Answer(prompt, "It is", finished=False),
    ]
    assert opened("my_rewards:brevity").score(answers) == pytest.approx([1.97, 0.97, -0.02])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "gave 1 scores for 3 answers"),
        ("return [1.0, float('nan'), 2.0]", "gave nan as score 2 of 3; expected a finite number"),
        ("return [1.0, 2.0, float('-inf')]", "gave -inf as score 3 of 3"),
        ("return [1.0, None, 2.0]", "gave NoneType as score 2 of 3; expected a number"),
        ("return None", "raised TypeError"),
        ("return [a.txt for a in answers]", r"raised AttributeError: .*txt.* \(my_rewards.py:2\)"),
    ],
)
def test_what_a_function_must_not_return(module: Path, body: str, message: str) -> None:
    """The error names the function, so that its author knows whom to ask."""
    module.write_text(f"def f(answers):\n    {body}\n")
    with pytest.raises(InputError, match=rf"my_rewards:f {message}"):
        CalledScorer("my_rewards:f").score(ANSWERS)


def test_it_cannot_be_reached_by_what_it_does_to_the_list(module: Path) -> None:
    module.write_text("def f(answers):\n    answers.clear()\n    return [1.0, 2.0, 3.0]\n")
    given = list(ANSWERS)
    assert CalledScorer("my_rewards:f").score(given) == [1.0, 2.0, 3.0]
    assert given == ANSWERS


# Ensembles


def test_ensembles_combine_each_answers_scores() -> None:
    members = [Fixed("a", 1.0, 5.0, -3.0), Fixed("b", 3.0, 1.0, -1.0)]
    assert MemberScorer(members, "mean").score(ANSWERS) == [2.0, 3.0, -2.0]
    assert MemberScorer(members, "min").score(ANSWERS) == [1.0, 1.0, -3.0]
    assert MemberScorer(members, "min").name == "min(a, b)"


def test_an_ensemble_of_ensembles_is_opened_from_a_recipe() -> None:
    """Words 1, 1, 1 of at least 2: 0.5 each. Characters 1, 2, 3 of at most 1: 1, 1/2, 1/3."""
    short = {"rule": "length", "max": 1, "unit": "characters"}
    block = {"ensemble": [{"rule": "length", "min": 2}, {"ensemble": [short, short], "combine": "min"}]}
    assert opened(block).score(ANSWERS) == pytest.approx([0.75, 0.5, 0.5 / 2 + 1 / 6])


# Our own reward models


def test_a_folder_with_our_head_is_opened_as_our_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It brings its template along, so a recipe cannot give it another one."""
    calls: list[Any] = []
    made = SimpleNamespace(
        RewardModelScorer=lambda model, **options: calls.append((model.path, options)) or Fixed("own")
    )
    monkeypatch.setitem(sys.modules, "align.scoring.reward_model", made)
    (tmp_path / "reward_head.safetensors").touch()
    (tmp_path / "t.jinja").touch()
    assert (
        opened({"model": str(tmp_path), "dtype": "bf16", "batch_tokens": 99}, cache=tmp_path, ids_from="digest").name
        == "own"
    )
    settings = {"cache": tmp_path, "device": "cpu", "dtype": "bf16", "ids_from": "digest", "microbatch_tokens": 99}
    assert calls == [(str(tmp_path), settings)]
    with pytest.raises(InputError, match="knows its own template, length and grades; remove chat_template, max_length"):
        opened({"model": str(tmp_path), "chat_template": str(tmp_path / "t.jinja"), "max_length": 9})


# Kept scores


class Counting:
    """Scores by length, and knows what it was asked."""

    name = "length"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def score(self, answers: Sequence[Answer]) -> list[float]:
        self.asked.append([answer.text for answer in answers])
        return [len(answer.text) / 3 for answer in answers]


def kept(folder: Path, scorer: Scorer, answers: Sequence[Answer] = ANSWERS, **options: Any) -> list[float]:
    settings: dict[str, Any] = {
        "key": {"scorer": "length"},
        "console": Console(file=io.StringIO()),
        "name": "x",
        "shard_answers": 2,
    }
    return score_answers(lambda: scorer, answers, folder=folder, **{**settings, **options})


def test_scores_are_kept_and_found_again(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    assert kept(tmp_path, first) == [1 / 3, 2 / 3, 1.0]
    assert first.asked == [["a", "bb"], ["ccc"]]
    assert kept(tmp_path, second) == [1 / 3, 2 / 3, 1.0], "floats come back to the last bit"
    assert second.asked == []


def test_scores_of_other_answers_or_another_scorer_are_not_taken(tmp_path: Path) -> None:
    kept(tmp_path, Counting())
    other = [Answer(ANSWERS[0].prompt, "a"), Answer(ANSWERS[0].prompt, "b", finished=False)]
    assert kept(tmp_path, Counting(), other) == [1 / 3, 1 / 3]
    again = Counting()
    kept(tmp_path, again, other, key={"scorer": "else"})
    assert again.asked == [["a", "b"]]


def test_a_damaged_shard_is_scored_again(tmp_path: Path) -> None:
    """One shard with a changed digit."""
    kept(tmp_path, Counting())
    shard = sorted(tmp_path.glob("scores-*.json"))[0]
    shard.write_text(shard.read_text().replace("0.3", "0.4"))
    again = Counting()
    assert kept(tmp_path, again) == [1 / 3, 2 / 3, 1.0]
    assert again.asked == [["a", "bb"]]


def test_a_signal_stops_between_shards_and_nothing_is_scored_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Counting(), Counting()
    monkeypatch.setattr(stored, "stop_requested", lambda: 15 if first.asked else None)
    with pytest.raises(Interrupted, match="stopped after 1 of 2 shards"):
        kept(tmp_path, first)
    assert first.asked == [["a", "bb"]]
    monkeypatch.setattr(stored, "stop_requested", lambda: None)
    assert kept(tmp_path, second) == [1 / 3, 2 / 3, 1.0]
    assert second.asked == [["ccc"]]


def test_processes_share_the_shards(tmp_path: Path) -> None:
    """Each scores every second one; after the barrier both have all scores."""
    ours, theirs = Counting(), Counting()
    results: list[list[float]] = []

    class Other(Ranks):
        def barrier(self) -> None:
            pass

    class First(Ranks):
        def barrier(self) -> None:
            results.append(kept(tmp_path, theirs, group=Other(1, 2)))

    results.append(kept(tmp_path, ours, group=First(0, 2)))
    assert results == [[1 / 3, 2 / 3, 1.0]] * 2
    assert (ours.asked, theirs.asked) == ([["a", "bb"]], [["ccc"]])


def test_a_model_that_gives_nan_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the scorer bad gave nan as score 2 of 2"):
        kept(tmp_path, Fixed("bad", 1.0, float("nan")))
    assert not list(tmp_path.glob("scores-*"))


def test_require_scores_gives_plain_numbers() -> None:
    assert require_scores("x", [1, True, 2.5], 3) == [1.0, 1.0, 2.5]
    assert json.dumps(require_scores("x", [1], 1)) == "[1.0]"
