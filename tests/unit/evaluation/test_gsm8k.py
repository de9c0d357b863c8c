"""GSM8K: which number of an answer counts, and when two numbers are the same."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.records import Origin, Prompt
from align.data.strict_json import RowError
from align.evaluation.tasks import gsm8k
from align.evaluation.tasks.task import open_task
from align.recipe.kinds.tasks import Gsm8kTask

TASK = open_task(Gsm8kTask.model_validate({"task": "gsm8k", "data": "gsm.jsonl"}))


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("#### 12", "12"),
        ("#### 12\nCheck: 12 = 3 * 4, so 5 boxes remain.", "12"),  # the mark wins over what comes after it
        ("#### 3\nNo, again.\n#### 4", "4"),  # the last mark
        ("3 boxes and 4 boxes are 7.", "7"),
        ("In total $1,250.50 is paid.", "$1,250.50"),
        ("It falls to -3 degrees", "-3"),
        ("**18**", "18"),
        ("The share is .5", ".5"),
        ("answer: 1.5.", "1.5"),
        ("from 2019-2021", "2021"),  # a dash between numbers is no sign
        ("no number at all", None),
        ("", None),
    ],
)
def test_extraction(answer: str, number: str | None) -> None:
    assert gsm8k.extract(answer) == number


def asked(answer: str) -> Prompt:
    form = gsm8k.as_prompt({"id": 3, "question": "How many?", "answer": answer})
    return Prompt(({"role": "user", "content": form["prompt"]},), form["id"], Origin("f", 1), fields=form)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("#### 1250", 1.0), ("#### $1,250.00", 1.0), ("It is 1250.", 1.0), ("#### 1251", 0.0), ("125", 0.0), ("?", 0.0)],
)
def test_exact_match_of_the_number(answer: str, right: float) -> None:
    assert TASK.grade(asked("2 * 625 = <<2*625=1250>>1250\n#### 1,250"), answer) == {"exact_match": (right, 1.0)}


def test_a_row_becomes_a_prompt_and_a_worked_example() -> None:
    one = asked("2 * 3 = <<2*3=6>>6\n#### 6")
    assert (
        one.id == "gsm8k-3"
        and one.prompt[0]["content"].startswith("How many?\n\n")
        and gsm8k.INSTRUCTION in one.prompt[0]["content"]
    )
    assert TASK.solution(one) == "2 * 3 = 6\n#### 6"


@pytest.mark.parametrize(
    "row",
    [{"question": "a", "answer": "4"}, {"question": "a"}, {"answer": "#### 4"}, {"question": "", "answer": "#### 4"}],
)
def test_rows_that_cannot_be_used(row: dict[str, Any]) -> None:
    with pytest.raises(RowError):
        gsm8k.as_prompt(row)
