"""Proposing a line of a recipe for rows of an unknown format, guessed from their columns. It is only shown in messages,
for the user to copy and change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.data.formats.column_names import PROMPTS, column, quoted, yaml_line
from align.data.formats.inside import GOOD_AND_BAD, VERDICTS, inside, is_turns, word
from align.data.mapping.places import find
from align.data.rows import Columns
from align.data.strict_json import RowError

_ANSWERS = re.compile(r"answer|response|reply|repl(ies)|output|completion|chosen|rejected|generation", re.IGNORECASE)
_JUDGES = re.compile(
    r"winner|prefer|better|chosen|rejected|(^|_)rank(s|ing)?($|_)|safer|label|choice|vote|rating|besser|gewinner|urteil"
    r"|meilleur|mejor|verdict",
    re.IGNORECASE,
)
_LABELS = re.compile(r"label|thumbs?(_?(up|down))?|feedback|verdict|vote|liked|rating", re.IGNORECASE)
_GRADES = re.compile(r"score|rating|rank|votes|grade|stars|reward", re.IGNORECASE)
_TEXTS = re.compile(r"text|content|message|messages|conversation|body|value|answer|response|reply|output|completion")
"""Names of the text of an answer that is an object."""
_NUMBERED = re.compile(r"(\S.*?)[\s_.-]*\(?([A-Da-d1-4])\)?")
"""``Antwort A``, ``answer_1``: a name, and the letter or number of one of several."""
_NAMES = (("left", "right"), ("first", "second", "third", "fourth"), ("a", "b", "c", "d"), ("1", "2", "3", "4"))
"""Names of objects and columns with answers that are told apart by a word, letter or number only."""
_ASKED = re.compile(
    r"(user|human|customer)[_ ]?(message|text|question|input|query|prompt)|message|asked|ask", re.IGNORECASE
)
_SAID = re.compile(r"(bot|assistant|model|agent|ai)[_ ]?(message|text|answer|reply|response|output)", re.IGNORECASE)
_FEW, _BRIEF = 5, 12
"""Largest number of different values, and of characters of each, at a place that may have judgements."""


def line_to_write(rows: Sequence[Columns]) -> str:
    """A line of a recipe for rows like these, of which there is at least one."""
    row = rows[0]
    if line := _by_name(row) or _comparison(rows) or _listed(row) or _labelled(rows):
        return line
    texts = [
        key
        for key, value in row.items()
        if isinstance(value, str)
        and value.strip()
        and not value.strip().isdigit()
        and key.lower() not in ("id", "uuid", "source")
    ]
    lists = [
        key
        for key, value in row.items()
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
    ]
    if lists:
        return f"format: {{messages: {lists[0]}}}"
    asked, answered = [*texts, "PLACE", "PLACE"][:2]
    return f"format: {{prompt: {quoted(asked)}, completion: {quoted(answered)}}}"


def answers_inside(row: Columns) -> list[str]:
    """The places of several answers inside the objects of a row."""
    answers, _, _ = _side_by_side(_places(row))
    return answers if answers and "." in answers[0] else []


def _places(row: Columns) -> dict[str, Any]:
    """Every place of a row with its value; for lists, that of the first item that has one."""
    found = dict(row)
    for name, value in row.items():
        if not is_turns(value):
            for place, _, held in inside(name, value):
                found.setdefault(place, held)
    return found


def _line(asked: Any, **keys: Any) -> str:
    return f"format: {yaml_line({**({} if asked is None else {'prompt': asked}), **keys})}"


def _asked(row: Columns, without: Iterable[str]) -> str:
    """The place of the question: a known name, a list of messages, or the first text that has no other use."""
    used = [*without, *(re.split(r"[.\[]", place)[0] for place in without)]
    if (known := column(row, PROMPTS, used)) is not None:
        return known
    turns = next((key for key, value in row.items() if key not in used and is_turns(value)), None)
    texts = [
        key
        for key, value in row.items()
        if key not in used
        and isinstance(value, str)
        and value.strip()
        and not value.strip().isdigit()
        and value.lstrip()[:1] not in ("{", "[")
    ]
    return turns or next(iter(texts), "PLACE")


def _by_name(row: Columns) -> str | None:
    """The line for answers inside an object that are called chosen and rejected."""
    places = _places(row)
    for chosen, value in places.items():
        steps = chosen.split(".")
        for at, step in enumerate(steps):
            if step.lower() != "chosen" or len(steps) < 2:
                continue
            rejected = ".".join([*steps[:at], "REJECTED" if step.isupper() else "rejected", *steps[at + 1 :]])
            text = isinstance(value, str) and len(value) > 1 and not value.strip().isdigit()
            if (text or is_turns(value)) and rejected in places and "[*]" not in chosen:
                return _line(_asked(row, [chosen, rejected]), chosen=chosen, rejected=rejected)
    return None


def _comparison(rows: Sequence[Columns]) -> str | None:
    """The line for rows with several answers, and a place that judges them, recognised by its name or its values."""
    places = _places(rows[0])
    answers, names, marks = _side_by_side(places)
    if len(answers) < 2:
        return None
    if (scores := _own_scores(places, answers)) is not None:
        order = {"order": "low"} if "rank" in scores[0].lower() else {}
        return _line(_asked(rows[0], answers), answers=answers, better={"score": scores, **order})
    said = {place: _short_values(place, rows) for place in places if not _of_answers(place, answers)}
    named = [place for place in said if said[place] and _JUDGES.search(_last(place))]
    named += [place for place in said if place not in named and not said[place] and _JUDGES.search(place)]
    known = {name.upper() for name in (*names, *marks)}
    of_names = [place for place, values in said.items() if {value.upper() for value in values} & known]
    few = [place for place, values in said.items() if 1 < len(values) <= _FEW and 2 * len(values) <= len(rows)]
    judges = [*(place for place in named if place in of_names), *named, *of_names, *few]
    if not judges:
        return None
    judge = judges[0]
    spoken = {value.upper() for value in said[judge]}
    series = next((one for one in (names, marks) if spoken & {name.upper() for name in one}), None)
    values = series or [chr(ord("A") + i) for i in range(len(answers))]
    ties = [value for value in said[judge] if value.upper() not in map(str.upper, values) and value.isalpha()]
    better = {"winner": judge, "values": list(values), "ties": ties[:3] if series and ties else ["same"]}
    return _line(_asked(rows[0], [*answers, judge]), answers=answers, better=better)


def _last(place: str) -> str:
    return place.rpartition(".")[2].removesuffix("[*]")


def _of_answers(place: str, answers: Sequence[str]) -> bool:
    """Is this place an answer, or part of the object that contains an answer?"""
    return any(place == answer or ("." in answer and place.startswith(answer.rpartition(".")[0])) for answer in answers)


def _side_by_side(places: Columns) -> tuple[list[str], list[str], list[str]]:
    """Up to four places with answers, and two lists of names by which judgements may refer to them. They are recognised
    by names that differ in a letter, a number, or a word such as left and right; else by columns whose names mean
    answers."""
    alike: dict[tuple[str, ...], dict[str, tuple[str, str]]] = {}
    for place, value in places.items():
        if "[*]" in place or not (isinstance(value, str) or is_turns(value)):
            continue
        steps = place.split(".")
        for at, step in enumerate(steps):
            if at < len(steps) - 1 and not _TEXTS.fullmatch(steps[-1].lower()):
                continue
            series = next((one for one in _NAMES if step.lower() in one), None)
            numbered = _NUMBERED.fullmatch(step) if series is None else None
            if series is not None:
                key = (*steps[:at], str(series), *steps[at + 1 :])
                alike.setdefault(key, {})[place] = step, chr(ord("A") + series.index(step.lower()))
            elif numbered is not None:
                key = (*steps[:at], numbered[1].lower(), *steps[at + 1 :])
                alike.setdefault(key, {})[place] = numbered[2].upper(), step
    for found in alike.values():
        if len(found) > 1:
            four = list(found.items())[:4]
            return [place for place, _ in four], [one for _, (one, _) in four], [other for _, (_, other) in four]
    answers = [
        key
        for key, value in places.items()
        if "." not in key and _ANSWERS.search(key) and isinstance(value, str) and len(value.strip()) > 1
    ][:4]
    letters = [chr(ord("A") + i) for i in range(len(answers))]
    return answers, letters, letters


def _own_scores(places: Columns, answers: Sequence[str]) -> list[str] | None:
    """The places of a number beside each answer, in its object; None without one."""
    first, dot, _ = answers[0].rpartition(".")
    for place, value in places.items():
        key = place.removeprefix(f"{first}.")
        if dot and place != key and "." not in key and _GRADES.search(key) and _is_number(value):
            scores = [f"{answer.rpartition('.')[0]}.{key}" for answer in answers]
            if all(score in places for score in scores):
                return scores
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _listed(row: Columns) -> str | None:
    """The line for answers in a list of objects, each with its own grade or label."""
    places = _places(row)
    for answers, value in places.items():
        above, mark, key = answers.rpartition("[*].")
        if not mark or "[*]" in above or not isinstance(value, str) or not _TEXTS.fullmatch(key.lower()):
            continue
        beside = {place: held for place, held in places.items() if place.startswith(f"{above}[*].")}
        for place, held in beside.items():
            if _GRADES.search(_last(place)) and _is_number(held):
                order = {"order": "low"} if "rank" in place.lower() else {}
                return _line(_asked(row, [above]), answers=answers, better={"score": place, **order})
        for place, held in beside.items():
            if isinstance(held, bool) and (_JUDGES.search(_last(place)) or _LABELS.search(_last(place))):
                return _line(_asked(row, [above]), answers=answers, better={"label": place})
    return None


def _labelled(rows: Sequence[Columns]) -> str | None:
    """The line for rows with one answer, and a word or a boolean that judges it."""
    row = rows[0]
    for place in _places(row):
        held = _at(rows, place)
        words = {word(value) for value in held if isinstance(value, str)} - {""}
        boolean = bool(held) and all(isinstance(value, bool) for value in held)
        signs = {str(value).strip() for value in held if isinstance(value, (int, str))} - {"", "0"}
        signed = "-1" in signs and signs <= {"1", "-1"}
        if not boolean and not signed and not (words and words <= VERDICTS):
            continue
        if not _LABELS.fullmatch(_last(place)):
            continue
        label: dict[str, Any] = {"label": place}
        if signed:
            label |= {"good": [1], "bad": [-1]}
        elif not boolean:
            good, bad = next((pair for pair in GOOD_AND_BAD if words <= set(pair)), (None, None))
            if good is None:
                return None
            label |= {"good": [_as_written(held, good)], "bad": [_as_written(held, bad)]}
        return _one_answer(row, place, label)
    return None


def _one_answer(row: Columns, place: str, label: dict[str, Any]) -> str | None:
    """The line for a row with one answer, or messages, that a label judges."""
    judge = re.split(r"[.\[]", place)[0]
    turns = next((key for key, value in row.items() if key != judge and is_turns(value)), None)
    if turns is not None:
        return _line(None, messages=turns, better=label)
    texts = [key for key, value in row.items() if key != judge and isinstance(value, str) and value.strip()]
    said = [key for key in texts if _SAID.fullmatch(key)] or [key for key in texts if _ANSWERS.search(key)]
    asked = [key for key in texts if key not in said and (key.lower() in PROMPTS or _ASKED.fullmatch(key))]
    return _line(asked[0], completion=said[0], better=label) if asked and said else None


def _as_written(values: Iterable[Any], wanted: str | None) -> str:
    return next((value.strip() for value in values if word(value) == wanted), str(wanted))


def _at(rows: Sequence[Columns], place: str) -> list[Any]:
    """The values at a place of the rows; a list there counts item by item."""
    found: list[Any] = []
    for row in rows:
        try:
            value = find(row, place)
        except (RowError, ValueError):  # text that is not JSON, or a name that is not a place
            value = row.get(place)
        found += value if isinstance(value, list) else [value]
    return [value for value in found if value is not None]


def _short_values(place: str, rows: Sequence[Columns]) -> list[str]:
    """The different texts and whole numbers at a place, ignoring case; empty if one is long."""
    found: dict[str, str] = {}
    for value in _at(rows, place):
        text = str(value).strip() if isinstance(value, (str, int)) else ""
        if len(text) > _BRIEF:
            return []
        if text:
            found.setdefault(text.lower(), text)
    return list(found.values())
