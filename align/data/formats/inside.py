"""Finding the values inside the objects and lists of a row, with their places as a recipe names them; and recognising
those that judge answers, which must not be ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

from align.data.strict_json import RowError, parse_text

_DEEPEST = 4
"""Depth to which nested objects and lists are searched."""
_WIDEST = 3
"""Number of items of a list that are searched; the others are assumed to be alike."""
_LONGEST = 40
"""Largest number of characters of a judgement: a name, not a sentence."""

_JUDGING = r"(?:\w*_)?(?:winner|preferred|preference|votes?|verdict|chosen|rejected|thumbs?(?:_?(?:up|down))?)"
_GRADING = r"score|rating|reward|votes?|is_correct|correct|verified|passed|success"
_JUDGES = re.compile(_JUDGING, re.IGNORECASE)
_GRADES = re.compile(_GRADING, re.IGNORECASE)
"""Keys whose number says how good an answer is, like a column of that name."""
_IN_TEXT = re.compile(rf'"(?:{_JUDGING}|{_GRADING}|label)"\s*:', re.IGNORECASE)
"""The same in JSON text, which is parsed only if this matches."""

GOOD_AND_BAD = (
    ("up", "down"),
    ("thumbs_up", "thumbs_down"),
    ("good", "bad"),
    ("like", "dislike"),
    ("liked", "disliked"),
    ("positive", "negative"),
    ("accepted", "rejected"),
    ("accept", "reject"),
    ("yes", "no"),
    ("correct", "incorrect"),
    ("correct", "wrong"),
    ("pass", "fail"),
    ("desirable", "undesirable"),
)
"""Pairs of words that judge an answer by itself, the good one first."""
VERDICTS = frozenset(word for pair in GOOD_AND_BAD for word in pair)


def word(value: Any) -> str:
    """A text in the form in which judging words are compared: without case, outer blanks, and punctuation between its
    parts."""
    return re.sub(r"[\s-]+", "_", value.strip().lower()) if isinstance(value, str) else ""


def is_judging_word(value: Any) -> bool:
    """Is this one of the words that judge an answer by itself?"""
    return word(value) in VERDICTS


def is_turns(value: Any) -> bool:
    """Is this a list of messages?"""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) for item in value)
        and any("role" in item or "from" in item for item in value)
    )


def inside(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """``(place, key, value)`` of every entry of the objects in ``value``, whose place is ``name``, also in JSON texts.
    Messages are not searched."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with suppress(RowError):  # a text that only begins like JSON
            value = parse_text(value, name, "")
    if isinstance(value, list) and not is_turns(value):
        name = f"{name}[*]"
        items = [item for item in value[:_WIDEST] if isinstance(item, Mapping)]
        for item in value[:_WIDEST] if depth < _DEEPEST else ():
            if isinstance(item, list):
                yield from inside(name, item, depth + 1)
    else:
        items = [value] if isinstance(value, Mapping) else []
    for item in items:
        for key, held in item.items():
            if isinstance(key, str) and not re.search(r"[.\[\]{}]", key):  # other keys cannot be part of a place
                place = f"{name}.{key}"
                yield place, key, held
                if depth < _DEEPEST and isinstance(held, (Mapping, list)):
                    yield from inside(place, held, depth + 1)


def judgement(name: str, value: Any, *, answers: bool) -> str | None:
    """The place inside a column that says how good answers are, such as ``judgements[*].vote``; None when there is
    none.

    ``answers``: all answers will be trained on, so grades of them count too.
    """
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("{", "[") or not _IN_TEXT.search(value):
            return None
        try:
            value = parse_text(value, name, "")
        except RowError:  # a text that only begins like JSON
            return None
    found = _judged(value, answers, 0)
    return None if found is None else name + found


def _judged(value: Any, answers: bool, depth: int) -> str | None:
    """The rest of such a place, from ``value`` on. It is searched for in every row, so for speed a place is composed
    only once one is found, and objects are recognised by their exact type."""
    if isinstance(value, list):
        if depth > _DEEPEST or is_turns(value):
            return None
        for item in value[:_WIDEST]:
            if isinstance(item, (dict, list)) and (found := _judged(item, answers, depth + 1)) is not None:
                return f"[*]{found}"
    elif isinstance(value, dict) and depth <= _DEEPEST:
        for key, held in value.items():
            known = _known(key) if isinstance(key, str) else None
            if known is None:
                continue
            if known and judges(key, held, answers=answers):
                return f".{key}"
            if isinstance(held, (dict, list)) and (found := _judged(held, answers, depth + 1)) is not None:
                return f".{key}{found}"
    return None


@lru_cache(maxsize=16_384)
def _known(key: str) -> bool | None:
    """Whether a key of this name says which answers are good. None for a name that cannot be part of a place."""
    if re.search(r"[.\[\]{}]", key):
        return None
    return key.lower() == "label" or bool(_GRADES.fullmatch(key) or _JUDGES.fullmatch(key))


def judges(key: str, value: Any, *, answers: bool) -> bool:
    """Does the value of this key say how good answers are? ``answers`` as for :func:`judgement`."""
    if value in (None, "", [], {}):
        return False
    if isinstance(value, (bool, int, float)) and answers and _GRADES.fullmatch(key):
        return True
    if key.lower() == "label":
        return isinstance(value, bool) or is_judging_word(value)
    if not _JUDGES.fullmatch(key):
        return False
    if isinstance(value, str):
        return len(value.strip()) <= _LONGEST or key.lower() in ("chosen", "rejected")
    return isinstance(value, (bool, Mapping, list)) or (isinstance(value, int) and "vote" not in key.lower())


def may_judge(value: Any) -> bool:
    """Could the value contain a judgement? A quick check for later rows."""
    if isinstance(value, str):
        return value.lstrip()[:1] in ("{", "[")
    return isinstance(value, Mapping) or (
        isinstance(value, list)
        and any(isinstance(item, (Mapping, list)) for item in value[:_WIDEST])
        and not is_turns(value)
    )
