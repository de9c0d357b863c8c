"""Rules as rewards: pure functions of an answer's text, from 0 (rule broken) to 1 (rule kept), and the scorer that
applies one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import regex

from align.errors import InputError
from align.recipe.blocks.scoring import (
    FormatRule,
    JsonRule,
    LanguageMixRule,
    LengthRule,
    RegexRule,
    RepetitionRule,
    Rule,
)
from align.scoring.scorer import Answer
from align.scoring.text_metrics import distinct_n, language_mix, words

REGEX_SECONDS = 1.0
"""Time limit of a regular expression on one text. Some, such as ``(a+)+$``, take exponential time on some texts."""


def in_range(length: int, least: int, most: int | None) -> float:
    """1 inside the range; outside it the ratio of ``length`` to the nearer end, or its inverse: half as long as
    ``least`` and twice as long as ``most`` both score 0.5."""
    if length < least:
        return length / least
    return most / length if most is not None and length > most else 1.0


def well_formed(
    text: str,
    *,
    starts_with: str | None = None,
    ends_with: str | None = None,
    contains: Sequence[str] = (),
    max_lines: int | None = None,
) -> float:
    """The share of the given conditions that ``text`` meets, without white space at its ends. At least one condition
    must be given."""
    text = text.strip()
    met = [part in text for part in contains]
    met += [] if starts_with is None else [text.startswith(starts_with)]
    met += [] if ends_with is None else [text.endswith(ends_with)]
    met += [] if max_lines is None else [sum(bool(line.strip()) for line in text.splitlines()) <= max_lines]
    return sum(met) / len(met)


def matches(pattern: str, text: str, *, full: bool = False) -> bool:
    """Whether a regular expression (of the package `regex`) is found in ``text``, or with ``full`` matches the whole of
    it.

    Raises InputError when that takes longer than :data:`REGEX_SECONDS`.
    """
    compiled = regex.compile(pattern)
    try:
        match = (compiled.fullmatch if full else compiled.search)(text, timeout=REGEX_SECONDS)
    except TimeoutError as error:
        message = (
            f"the regular expression `{pattern[:80]}` takes more than {REGEX_SECONDS:g} s on one text ({len(text):,}"
            " characters)"
        )
        raise InputError(message, hint="avoid repetitions inside repetitions, such as (a+)+") from error
    return match is not None


def is_json(text: str, required: Sequence[str] = ()) -> bool:
    """Whether ``text`` is one JSON value and, if keys are ``required``, an object that has them. NaN and Infinity are
    not JSON."""
    try:
        value = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return False
    return not required or (isinstance(value, dict) and value.keys() >= set(required))


def _not_json(name: str) -> None:
    raise ValueError(name)


def one_language(text: str, tolerance: float) -> float:
    """1 if the rarer of the two languages, Chinese and English, has at most ``tolerance`` of the words; with more it
    falls linearly, to 0 for half of each."""
    return 1.0 - max(0.0, language_mix(text) - tolerance) / (0.5 - tolerance)


_RULES: dict[type[Rule], Callable[[Any, str], float]] = {
    LengthRule: lambda rule, text: in_range(
        len(words(text)) if rule.unit == "words" else len(text), rule.min, rule.max
    ),
    FormatRule: lambda rule, text: well_formed(
        text, starts_with=rule.starts_with, ends_with=rule.ends_with, contains=rule.contains, max_lines=rule.max_lines
    ),
    RegexRule: lambda rule, text: float(matches(rule.pattern, text, full=rule.match == "full")),
    JsonRule: lambda rule, text: float(is_json(text, rule.required)),
    LanguageMixRule: lambda rule, text: one_language(text, rule.tolerance),
    RepetitionRule: lambda rule, text: distinct_n([text], rule.n),
}


class RuleScorer:
    """Scores by one rule of a recipe. For a prompt without an answer the rule is applied to the user's last message."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.name = rule.rule

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The rule's score of each answer, from 0 to 1. Raises InputError for a regular expression that takes too
        long."""
        apply = _RULES[type(self._rule)]
        return [
            apply(self._rule, answer.prompt[-1]["content"] if answer.prompt_only else answer.text) for answer in answers
        ]
