"""Columns of a source that are not read although they may carry meaning: they are reported once, or refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.data.formats import column_names
from align.data.formats.inside import is_turns, judgement, judges, may_judge
from align.data.formats.proposed import answers_inside, line_to_write
from align.data.formats.wanted import kinds_of
from align.data.rows import Columns
from align.data.strict_json import clip
from align.recipe.rows.presets import PRESETS

if TYPE_CHECKING:
    from align.data.formats.detect import Found


def unread_grades(rows: Iterable[Columns], read: set[str]) -> list[str]:
    """Unread columns that may grade answers which are compared in another way; reported once."""
    found: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (
                name not in read
                and column_names.GRADES.search(name)
                and (number or (isinstance(value, str) and name.lower() == "status"))
            ):
                found.setdefault(clip(name, 40), None)
    return list(found)


def unread_texts(rows: Iterable[Columns], read: set[str]) -> list[str]:
    """Unread columns with long texts, reported once since they may be meant."""
    found: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            if name not in read and isinstance(value, str) and len(value) >= column_names.LONG:
                found.setdefault(clip(name, 40), None)
    return list(found)


def complain_of_judgements(
    unread: Columns, row: Columns, rows: Sequence[Columns], *, answers: bool, bare: bool
) -> None:
    """Raises :class:`RowError` when a judgement of answers, inside an object or a list or as a word in a column, would
    not be read. ``rows`` are used to propose a recipe line.

    ``answers``: all answers will be trained on, so grades of them count too. ``bare``: only a prompt would be read, so
    several unread answers count too.
    """
    place = next((name for name, value in unread.items() if judges(name, value, answers=False)), None)
    place = place or next(
        (found for name, value in unread.items() if (found := judgement(name, value, answers=answers))), None
    )
    if place is None and bare and any(may_judge(value) for value in unread.values()):
        place = next(iter(answers_inside({**unread, **_turns_of(row)})), None)
    if place is None:
        return
    name = place if place in unread else re.split(r"[.\[]", place)[0]
    name = next((key for key in unread if place == key or place.startswith((f"{key}.", f"{key}["))), name)
    raise column_names.refusal(
        f"{clip(place, 80)} would stay unread, and may say which answers are good; say what the row is, such as"
        f" `{line_to_write(rows or [row])}`, or that this is not meant: ignore: [{column_names.quoted(name)}]"
    )


def _turns_of(row: Columns) -> Columns:
    return {name: value for name, value in row.items() if is_turns(value)}


def complain_of_unread(
    row: Columns, found: Found, want: str, read: Collection[str], rows: Sequence[Columns] = ()
) -> None:
    """Raises :class:`RowError` when a column of ``row`` that carries meaning is not among those ``read``.

    ``rows`` are other rows of the source, used to propose a recipe line.
    """
    unread = {key: value for key, value in row.items() if key not in read and value not in (None, "", [], {})}
    for name in unread:
        if name.lower() in column_names.MEDIA:
            raise column_names.refusal(
                f"has {name}, and a text model cannot take them; `ignore: [{name}]` says that the text does without",
                name,
            )
    bare = found.name == "prompt" or (found.name == "alpaca" and not row.get("output") and not row.get("chosen"))
    bare = bare or (found.mapping is not None and column_names.only_prompt(found.mapping))
    if bare:
        column_names.complain_of_comparison(unread, row, want)
    else:
        column_names.complain_of_meaning(unread, row, answers=want == "conversation")
    if not _says_which(row, found):
        alone = bare or (found.name == "messages" and _waits(row.get("messages")))
        complain_of_judgements(unread, row, rows, answers=want == "conversation", bare=alone)


def _waits(messages: Any) -> bool:
    """Are the messages a prompt, because they do not end with the assistant?"""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, Mapping) and last.get("role") != "assistant"


def _says_which(row: Columns, found: Found) -> bool:
    """Does the format read comparisons, labels or grades already? True for presets, all of whose columns are known."""
    if found.name in PRESETS or found.name in ("preference", "ultrafeedback", "hh_rlhf", "unpaired", "graded"):
        return True
    if found.mapping is not None:
        return kinds_of(found.mapping)[0] not in ("conversation", "prompt")
    return {"chosen", "rejected"} <= row.keys()
