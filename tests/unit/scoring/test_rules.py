"""Rule rewards against values worked out by hand, and what must not slip through a rule."""

from __future__ import annotations

from typing import Any

import pytest

from align.errors import InputError
from align.recipe.blocks import scoring as spec
from align.scoring.rules import RuleScorer, in_range, is_json, matches, one_language, well_formed
from align.scoring.scorer import Answer

PROMPT: Any = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say five words about rain, please do"},
)


def scored(rule: spec.Rule, *texts: str) -> list[float]:
    return RuleScorer(rule).score([Answer(PROMPT, text, ids=(5,)) for text in texts])


@pytest.mark.parametrize(
    ("length", "least", "most", "score"),
    [
        (0, 4, 8, 0.0),
        (2, 4, 8, 0.5),
        (4, 4, 8, 1.0),
        (8, 4, 8, 1.0),
        (16, 4, 8, 0.5),
        (32, 4, 8, 0.25),
        (0, 0, 8, 1.0),
        (99, 4, None, 1.0),
    ],
)
def test_length_falls_with_the_ratio_to_the_nearer_end(length: int, least: int, most: int | None, score: float) -> None:
    assert in_range(length, least, most) == score


def test_length_counts_words_or_characters() -> None:
    """Every Chinese character is a word: 今天很好 has four of them."""
    assert scored(spec.LengthRule(rule="length", min=4), "今天很好", "It's fine.", "") == [1.0, 0.5, 0.0]
    assert scored(spec.LengthRule(rule="length", max=4, unit="characters"), "今天很好", "12345678") == [1.0, 0.5]


def test_format_is_the_share_of_conditions_met() -> None:
    text = "# Plan\nfirst\n\nsecond\n# End"
    assert well_formed(text, starts_with="# Plan", ends_with="# End") == 1.0
    assert well_formed(text, starts_with="Plan", ends_with="# End") == 0.5
    assert well_formed(text, contains=["# Plan", "# End", "# Middle"]) == pytest.approx(2 / 3)
    assert well_formed(text, max_lines=4) == 1.0, "blank lines do not count"
    assert well_formed(text, max_lines=3) == 0.0
    assert well_formed("  # Plan \n", starts_with="# Plan", ends_with="Plan") == 1.0, (
        "white space at the ends does not count"
    )


def test_regex_is_found_anywhere_or_matches_all() -> None:
    assert matches(r"\d+", "about 42 of them")
    assert not matches(r"\d+", "about 42 of them", full=True)
    assert matches(r"\p{Han}+", "你好", full=True)
    assert scored(spec.RegexRule(rule="regex", pattern=r"(?i)^yes\b"), "Yes, it is.", "Is it? Yes.") == [1.0, 0.0]


def test_a_regex_that_takes_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catastrophic backtracking: 2^30 ways to read sixty letters. Python's own `re` would still be at it tomorrow."""
    monkeypatch.setattr("align.scoring.rules.REGEX_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"takes more than 0.1 s on one text \(61 characters\)"):
        scored(spec.RegexRule(rule="regex", pattern="(a|aa)+$"), "a" * 60 + "b")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"a": 1}', True),
        (" [1, 2]\n", True),
        ('"text"', True),
        ("", False),
        ("{'a': 1}", False),
        ('{"a": 1} and more', False),
        ('{"a": NaN}', False),
        ("[-Infinity]", False),
        ("[" * 100_000, False),
        ("9" * 10_000, False),
    ],
)
def test_json_is_the_whole_answer(text: str, good: bool) -> None:
    """NaN is Python's, not JSON's; neither deep nesting nor a huge number is an accident of ours."""
    assert is_json(text) is good


def test_json_with_required_keys_is_an_object_that_has_them() -> None:
    rule = spec.JsonRule(rule="json", required=["name", "age"])
    assert scored(rule, '{"name": "Ana", "age": 31}', '{"name": "Ana"}', '["name", "age"]') == [1.0, 0.0, 0.0]


def test_language_mix_falls_from_the_tolerance_to_half_and_half() -> None:
    """One in four words is English: 0.25 of 0.5, 0.15 beyond a tolerance of 0.1, so 1 - 0.15 / 0.4."""
    assert one_language("今天天 ok", 0.1) == pytest.approx(1 - 0.15 / 0.4)
    assert one_language("今 ok", 0.1) == pytest.approx(0.0)
    assert one_language("今 ok", 0.0) == pytest.approx(0.0)
    assert (
        scored(
            spec.LanguageMixRule(rule="language_mix"),
            "今天天气很好",
            "It is fine.",
            "42 + 1",
            "今天天气很好我们用Python吧",
        )
        == [1.0] * 4
    )


def test_repetition_is_the_share_of_different_ngrams() -> None:
    """`a b a b a`: the bigrams ab, ba, ab, ba; two of four are different."""
    assert scored(spec.RepetitionRule(rule="repetition", n=2), "a b a b a", "a b c", "a") == [0.5, 1.0, 1.0]


def test_a_prompt_without_an_answer_is_judged_by_its_last_message() -> None:
    """A policy that answers with nothing but its stop id has answered: that is judged as the empty text."""
    scorer = RuleScorer(spec.LengthRule(rule="length", min=7))
    assert scorer.score([Answer(PROMPT, ""), Answer(PROMPT, "", ids=(2,))]) == [1.0, 0.0]


@pytest.mark.parametrize("name", spec.RULES)
def test_every_rule_has_a_scorer_that_goes_by_its_name(name: str) -> None:
    options: dict[str, Any] = {"length": {"max": 3}, "format": {"max_lines": 1}, "regex": {"pattern": "x"}}
    rule = spec.RULES[name].model_validate({"rule": name, **options.get(name, {})})
    scorer = RuleScorer(rule)
    assert scorer.name == name
    assert all(
        0 <= score <= 1
        for score in scorer.score([Answer(PROMPT, text, ids=(1,)) for text in ("", "好 a", "{}", "x " * 50)])
    )
