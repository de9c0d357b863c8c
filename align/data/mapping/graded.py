"""Grades of answers, read from the places that a mapping names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.mapping.better import number
from align.data.mapping.places import find
from align.data.messages.forms import UNGRADED
from align.data.messages.messages import Note
from align.data.rows import LeftOut
from align.data.strict_json import RowError

ONE_UNGRADED = "an answer that nobody graded, left out"

Grades = dict[str, float | None]


def grades_of(row: Mapping[str, Any], places: Mapping[str, str], count: int) -> list[Grades]:
    """The grades of each of a row's ``count`` answers; None for a grade that is missing.

    Raises :class:`RowError` for a grade that is not a number, and for a list whose length is not ``count``.
    """
    found: list[Grades] = [{} for _ in range(count)]
    for name, where in places.items():
        value = find(row, where)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or (count > 1 and value is not None and not isinstance(value, list)):
            given = f"{len(values)} grades" if isinstance(value, list) else "1 grade"
            raise RowError(f"{given} for {count} answer{'s' * (count > 1)}", where)
        for grades, one in zip(found, values, strict=True):
            if isinstance(one, bool):
                raise RowError("expected a number, found a boolean; labels are `better: {label: ...}`", where)
            grades[name] = number(one, where)
    return found


def noted_without(answers: Sequence[tuple[Any, Grades]], note: Note) -> list[tuple[Any, Grades]]:
    """The answers that have a grade; the others are counted. Raises :class:`LeftOut` when none has one."""
    kept = [(value, grades) for value, grades in answers if any(grade is not None for grade in grades.values())]
    if not kept:
        raise LeftOut(UNGRADED)
    for _ in range(len(answers) - len(kept)):
        note(ONE_UNGRADED)
    return kept
