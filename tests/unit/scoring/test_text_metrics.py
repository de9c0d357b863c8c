"""Metrics of answers' text, against values worked out by hand."""

from __future__ import annotations

import pytest

from align.scoring.scorer import Answer
from align.scoring.text_metrics import (
    correlation,
    describe,
    distinct_n,
    language_mix,
    mixed_share,
    spread,
    unfinished_share,
    words,
)


def test_words() -> None:
    assert words("Don't stop: 42 naïve Cafés!") == ["don't", "stop", "42", "naïve", "cafés"]
    assert words("今天weather很好，OK？") == ["今", "天", "weather", "很", "好", "ok"]
    assert words("... -- ？！") == []


def test_distinct_n_counts_over_all_texts() -> None:
    """Two copies of one text have half as many different n-grams; texts shorter than n have none."""
    assert distinct_n(["a b c"], 2) == 1.0
    assert distinct_n(["a b c", "A b, c"], 2) == 0.5
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a", ""], 2) == 1.0


def test_language_mix_is_the_smaller_share() -> None:
    assert language_mix("今天 is good") == 0.5
    assert language_mix("今天天 ok 42") == 0.25, "numbers belong to no language"
    assert language_mix("Привет, мир") == language_mix("") == 0.0
    assert mixed_share(["今天 is good", "今天", "fine"]) == pytest.approx(1 / 3)
    assert mixed_share([]) == 0.0


def test_answers_that_never_end() -> None:
    said = [Answer((), "a"), Answer((), "b", finished=False), Answer((), "c", finished=False), Answer((), "d")]
    assert unfinished_share(said) == 0.5
    assert unfinished_share([]) == 0.0


def test_spread_and_correlation() -> None:
    assert spread([1.0, 3.0, 5.0, 7.0]) == {
        "mean": 4.0,
        "std": pytest.approx(5**0.5),
        "min": 1.0,
        "median": 4.0,
        "max": 7.0,
    }
    assert spread([]) == {}
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1.0)
    assert correlation([1, 2, 3], [5, 5, 5]) is None
    assert correlation([1], [2]) is None


def test_describe() -> None:
    found = describe([Answer((), "a b a b", ids=(1, 2, 3)), Answer((), "今天 is good", ids=(1,), finished=False)])
    assert found == {
        "answers": 2,
        "tokens": 2.0,
        "words": 4.0,
        "distinct_1": pytest.approx(6 / 8),
        "distinct_2": pytest.approx(5 / 6),
        "distinct_3": 1.0,
        "unfinished": 0.5,
        "mixed_languages": 0.5,
    }
    assert "tokens" not in describe([Answer((), "a")]), "an answer without ids has no length in tokens"
    assert describe([]) == {"answers": 0}
