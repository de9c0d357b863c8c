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

WORDS = {"exact_match": "GSM8K, problems solved (exact match)"}
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


def worked_example(row: Prompt) -> tuple[dict[str, str], dict[str, str]]:
    """A row as a question and its solution: turns before the one that is asked. Without the calculator's marks
    (``<<2+2=4>>``)."""
    solution = _CALCULATION.sub("", row.fields["answer"]).strip()
    return {"role": "user", "content": row.prompt[-1]["content"]}, {"role": "assistant", "content": solution}


def extract(answer: str) -> str | None:
    """The final number of an answer: the last one marked by ``####``, else the last number of all; None without a
    number.

    >>> extract("5 apples, then 7.\\n#### 12"), extract("So he pays $1,250.00."), extract("No idea.")
    ('12', '$1,250.00', None)
    """
    marked: list[str] = _MARKED.findall(answer)
    found: list[str] = marked or _ANY.findall(answer)
    return found[-1] if found else None


def grade(prompt: Prompt, answer: str) -> dict[str, tuple[float, float]]:
    """Whether the extracted number is the data's. ``1,250``, ``$1250`` and ``1250.00`` are one number."""
    found = extract(answer)
    right = found is not None and _value(found) == _value(prompt.fields["final"])
    return {"exact_match": (float(right), 1.0)}


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None
