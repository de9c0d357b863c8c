"""Refusing columns that a mapping names and no row has: a misspelt column must not be read as an empty one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.data.formats.detect import LOOK_AT
from align.data.rows import Row
from align.data.strict_json import clip, one_line
from align.errors import InputError, Problem
from align.recipe.checks.messages import did_you_mean
from align.recipe.rows.mapping import RowMapping
from align.recipe.rows.places import Place, template
from align.recipe.schema import DataSource

LOOK_FURTHER = 1_000
"""Number of rows in which a column of a mapping is looked for. JSON rows need not have keys without a value, so a
column may first occur late."""
_SHOWN = 24
"""Number of columns that an error lists."""


def seen_enough(source: DataSource, rows: Sequence[Row], read: int) -> bool:
    """Are the first rows, ``read`` of which were read and ``rows`` are used, enough to recognise the format, or to
    check a mapping's columns?"""
    mapping = source.reading
    if len(rows) < LOOK_AT:
        return False
    if not isinstance(mapping, RowMapping) or mapping.preset is not None or read >= LOOK_FURTHER:
        return True
    return read % LOOK_AT == 0 and not list(_lacking(mapping, [row.value for row in rows]))


def require_columns(mapping: RowMapping, rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Raises :class:`InputError` when ``mapping`` requires a column that none of the first ``rows`` has.

    Not every row needs an answer, and system, tools and the like are optional.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    number = f"{len(rows):,} " if len(rows) > LOOK_AT else ""
    problems = []
    for key, name in _lacking(mapping, rows):
        near = did_you_mean(name, columns)
        there = clip(", ".join(columns[:_SHOWN]), 300)
        hint = f"{near} They have {there}" if near else f"they have {there}"
        missing = one_line(f"the first {number}rows have no column `{name}`")
        problems.append(Problem(missing, file=path, key=key, hint=one_line(hint)))
    if problems:
        raise InputError(problems)


def _lacking(mapping: RowMapping, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(key of the mapping, column that none of the rows has)."""
    for key, where in _needed(mapping):
        if not any(name in row for row in rows for name in where.columns):
            yield key, where.columns[-1]


def _needed(mapping: RowMapping) -> Iterator[tuple[str, Place]]:
    """(key of the mapping, place) for each required place. Of a text with several places none is required."""
    keys = ("messages", "prompt", "completion", "chosen", "rejected", "answers")
    given: list[tuple[str, Any]] = [(key, getattr(mapping, key)) for key in keys]
    if mapping.better is not None:
        given += [
            (f"better.{key}", getattr(mapping.better, key)) for key in ("winner", "score", "signed", "ranking", "label")
        ]
    for key, value in given:
        for one in value if isinstance(value, list) else [value]:
            found = template(one) if isinstance(one, str) else None
            if isinstance(found, Place):
                yield key, found
