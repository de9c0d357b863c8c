"""Writing the requests to a judge and reading its replies: pairwise in both orders, and pointwise from 1 to 10."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from string import Template
from typing import Literal

import regex

from align.data.records import Messages

Language = Literal["en", "zh"]

DIMENSIONS = ("correctness", "helpfulness", "completeness", "clarity", "overall")

_VERDICT = regex.compile(r"^\W*(?:verdict|结论)\W*(a|b|tie)\b", regex.IGNORECASE | regex.MULTILINE)
_OBJECT = regex.compile(r"\{[^{}]*\}")


def pairwise(language: Language, prompt: Messages, a: str, b: str) -> str:
    """The request for a verdict on two answers."""
    return _template("pairwise", language).substitute(question=_spoken(prompt), reference="", a=a, b=b)


def pointwise(language: Language, prompt: Messages, answer: str, reference: str | None) -> str:
    """The request for grades of one answer, beside the ``reference`` if there is one."""
    beside = "" if reference is None else f"\n<reference_answer>\n{reference}\n</reference_answer>\n"
    return _template("pointwise", language).substitute(question=_spoken(prompt), reference=beside, answer=answer)


def read_verdict(reply: str) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie; None when the reply gives no verdict. The last verdict counts."""
    found: list[str] = _VERDICT.findall(reply)
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[-1].lower()] if found else None


def settle(ours_first: float, ours_second: float) -> tuple[float, bool]:
    """(our result, do both verdicts agree?) from the verdict with our answer as A and that with it as B.

    >>> settle(1.0, 0.0), settle(1.0, 1.0), settle(0.5, 0.5)
    ((1.0, True), (0.5, False), (0.5, True))
    """
    consistent = ours_first == 1.0 - ours_second
    return (ours_first if consistent else 0.5), consistent


def read_grades(reply: str) -> dict[str, float] | None:
    """The grade of each of :data:`DIMENSIONS`; None when the reply's last object does not give all of them, from 1 to
    10."""
    for text in reversed(_OBJECT.findall(reply)):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        grades = [value.get(name) for name in DIMENSIONS]
        if all(
            isinstance(grade, (int, float)) and not isinstance(grade, bool) and 1 <= grade <= 10 for grade in grades
        ):
            return {name: float(grade) for name, grade in zip(DIMENSIONS, grades, strict=True)}
        return None
    return None


@cache
def _template(method: str, language: Language) -> Template:
    return Template((Path(__file__).with_name("prompts") / f"{method}.{language}.txt").read_text(encoding="utf-8"))


def _spoken(prompt: Messages) -> str:
    """The prompt as text: a single question unchanged, a longer conversation with its roles."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)
