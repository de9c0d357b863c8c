"""GSM8K (Cobbe et al., arXiv 2110.14168): word problems with one number as the answer, graded by exact match of that
number."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

import regex

from align.data.messages.messages import text_of
from align.data.records import Prompt
from align.data.strict_json import RowError
from align.evaluation.tasks.task import Grades, Task, TaskMeasure
from align.recipe.kinds.tasks import Gsm8kTask

INSTRUCTION = "Work it out step by step. End with a line that holds `#### ` and the final number, nothing else."

_NUMBER = r"-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+"
_MARKED = regex.compile(r"####\s*(" + _NUMBER + ")")
_ANY = regex.compile(r"(?<![\d.,])" + f"(?:{_NUMBER})")
_CALCULATION = regex.compile(r"<<[^<>\n]*>>")


def as_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the benchmark (``question``, and an ``answer`` that ends with ``#### NUMBER``) as a prompt. Raises
    RowError."""
    question, answer = text_of(row.get("question"), "question"), text_of(row.get("answer"), "answer")
    marked = _MARKED.findall(answer)
    if not marked or _value(marked[-1]) is None:
        raise RowError("expected a solution that ends with `#### NUMBER`", "answer")
    named = {"id": f"gsm8k-{row['id']}"} if row.get("id") is not None else {}
    return {**named, "prompt": f"{question.strip()}\n\n{INSTRUCTION}", "answer": answer, "final": marked[-1]}


def extract(answer: str) -> str | None:
    """The final number of an answer: the last one marked by ``####``, else the last number of all; None without a
    number.

    >>> extract("5 apples, then 7.\\n#### 12"), extract("So he pays $1,250.00."), extract("No idea.")
    ('12', '$1,250.00', None)
    """
    marked: list[str] = _MARKED.findall(answer)
    found: list[str] = marked or _ANY.findall(answer)
    return found[-1] if found else None


class Gsm8k(Task[Gsm8kTask]):
    """See the module."""

    measures = (TaskMeasure("exact_match", "GSM8K, problems solved (exact match)", "up"),)

    def grade(self, prompt: Prompt, answer: str) -> Grades:
        """Whether the extracted number is the data's. ``1,250``, ``$1250`` and ``1250.00`` are one number."""
        found = extract(answer)
        right = found is not None and _value(found) == _value(prompt.fields["final"])
        return {"exact_match": (float(right), 1.0)}

    def solution(self, row: Prompt) -> str:
        """The data's, without the calculator's marks (``<<2+2=4>>``)."""
        solution: str = _CALCULATION.sub("", row.fields["answer"]).strip()
        return solution


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None
