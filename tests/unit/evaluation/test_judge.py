"""A judge's instructions and replies."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.records import Message
from align.evaluation import judge

ASK: tuple[Message, ...] = ({"role": "user", "content": "How much is $5 and ${x}?"},)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_instructions_hold_question_and_answers_as_they_are(language: Any) -> None:
    text = judge.pairwise(language, ASK, "first $a", "second {b}")
    assert (
        "How much is $5 and ${x}?" in text
        and text.index("first $a") < text.index("second {b}")
        and "$question" not in text
    )
    graded = judge.pointwise(language, ASK, "the answer", "the reference")
    assert graded.index("\nthe reference\n") < graded.index("\nthe answer\n")
    assert "reference_answer" not in judge.pointwise(language, ASK, "the answer", None)
    assert all(name in graded for name in judge.DIMENSIONS)
    assert judge.read_verdict(text) == 1.0, "the form that the instructions show is one that can be read"
    assert judge.read_grades(graded) == dict.fromkeys(judge.DIMENSIONS, 5.0)


def test_a_longer_conversation_has_its_roles() -> None:
    turns: tuple[Message, ...] = ({"role": "system", "content": "Be kind."}, *ASK)
    assert "[system]\nBe kind.\n\n[user]\nHow much" in judge.pairwise("en", turns, "a", "b")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is right.\nVerdict: A", 1.0),
        ("verdict: b", 0.0),
        ("**Verdict: tie**", 0.5),
        ("**Verdict:** B", 0.0),
        ("Verdict: A\nOn second thought:\nVerdict: B", 0.0),
        ("结论：A", 1.0),
        ("Verdict: [B]", 0.0),
        ("My verdict: A", None),
        ("Verdict: Answer A", None),
        ("A", None),
        ("", None),
    ],
)
def test_verdicts(reply: str, verdict: float | None) -> None:
    assert judge.read_verdict(reply) == verdict


def test_what_two_orders_say_together() -> None:
    """Ours first: A is ours. Ours second: B is ours."""
    assert judge.settle(1.0, 0.0) == (1.0, True)
    assert judge.settle(0.0, 1.0) == (0.0, True)
    assert judge.settle(0.5, 0.5) == (0.5, True)
    assert judge.settle(1.0, 1.0) == (0.5, False), "always the first one: a tie"
    assert judge.settle(1.0, 0.5) == (0.5, False)


GOOD = '{"correctness": 7, "helpfulness": 8, "completeness": 6, "clarity": 9, "overall": 7}'


@pytest.mark.parametrize(
    ("reply", "overall"),
    [
        (f"Fine.\n{GOOD}", 7.0),
        (f"```json\n{GOOD}\n```", 7.0),
        (GOOD.replace('"overall": 7', '"overall": 7.5'), 7.5),
        (GOOD.replace('"overall": 7', '"overall": 11'), None),
        (GOOD.replace('"overall": 7', '"overall": true'), None),
        (GOOD.replace(', "overall": 7', ""), None),
        ("overall: 7", None),
        ("{not json}", None),
    ],
)
def test_grades(reply: str, overall: float | None) -> None:
    found = judge.read_grades(reply)
    assert (found["overall"] if found else None) == overall
