"""What stands inside the objects and lists of a row, by the places that a recipe would name it with; and which of it
judges answers, so that it must not stay unread."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from align.data.strict_json import RowError, parse_text

_DEEPEST = 4
"""Objects and lists inside each other that are gone into."""
_WIDEST = 3
"""Items of a list that are looked at: they are alike."""
_LONGEST = 40
"""Characters of what a judge writes: a name, and no sentence."""

_JUDGES = re.compile(
    r"(.*_)?(winner|preferred|preference|votes?|verdict|chosen|rejected|thumbs?(_?(up|down))?)", re.IGNORECASE
)
_GRADES = re.compile(r"score|rating|reward|votes?|is_correct|correct|verified|passed|success", re.IGNORECASE)
"""Keys whose number says how good an answer is, as for a column with such a name."""
_IN_TEXT = re.compile(
    r'"(\w*_)?(winner|preferred|preference|votes?|verdict|chosen|rejected|thumbs?(_?(up|down))?|label|score|rating|reward'
    r'|is_correct|correct|verified|passed|success)"\s*:',
    re.IGNORECASE,
)
"""The same in JSON text: only where this is found is the text parsed."""

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
"""Words that judge one answer by itself, the good one first."""
VERDICTS = frozenset(word for pair in GOOD_AND_BAD for word in pair)


def word(value: Any) -> str:
    """A text as the words that judge are compared: without case, outer blanks and punctuation between its parts."""
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
    """``(place, key, value)`` of every entry of the objects in a value that stands at the place ``name``, also where it
    is written as JSON text. Messages are not gone into."""
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
            if isinstance(key, str) and not re.search(r"[.\[\]{}]", key):  # no place names any other
                place = f"{name}.{key}"
                yield place, key, held
                if depth < _DEEPEST and isinstance(held, (Mapping, list)):
                    yield from inside(place, held, depth + 1)


def judgement(name: str, value: Any, *, answers: bool) -> str | None:
    """The place inside a column that says how good answers are, such as ``judgements[*].vote``; None where there is
    none.

    ``answers``: all answers are trained on, so that a grade of them counts too.
    """
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("{", "[") or not _IN_TEXT.search(value):
            return None
    elif not isinstance(value, (Mapping, list)):
        return None
    return next((place for place, key, held in inside(name, value) if judges(key, held, answers=answers)), None)


def judges(key: str, value: Any, *, answers: bool) -> bool:
    """Does what stands under this key say how good answers are? ``answers`` as for :func:`judgement`."""
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
    """Might there be anything inside this value? For rows that come later."""
    if isinstance(value, str):
        return value.lstrip()[:1] in ("{", "[")
    return isinstance(value, Mapping) or (
        isinstance(value, list)
        and any(isinstance(item, (Mapping, list)) for item in value[:_WIDEST])
        and not is_turns(value)
    )
