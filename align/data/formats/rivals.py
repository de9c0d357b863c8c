"""Refusing rows that fit two formats which would give different records. The message has a recipe line for each, since
nothing tells which one is meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.data.formats import column_names
from align.data.formats.own_format import form_of
from align.data.formats.wanted import Want
from align.data.records import Origin, Prompt
from align.data.rows import Columns, Row
from align.data.strict_json import RowError
from align.recipe.rows.presets import PRESETS
from align.recipe.schema import DataSource

if TYPE_CHECKING:
    from align.data.formats.detect import Found


def require_one(rows: Sequence[Columns], found: Found, want: Want) -> None:
    """Raises a refusal when another format fits the rows as well as ``found`` and would give different records."""
    for rival in _rivals(rows[0], found, want):
        if any(_differ(row, found, rival, want) for row in rows):
            raise column_names.refusal(
                f"fits two shapes that would give different records; say which: format: {found.name} or"
                f" format: {rival.name}"
            )


def _rivals(row: Columns, found: Found, want: Want) -> Iterator[Found]:
    """Other presets all of whose columns the row has, unless one of the two requires all that the other requires and is
    therefore more specific. Also other columns with messages."""
    from align.data.formats.detect import Found, fits, made, shape_of

    if found.name in PRESETS:
        needs = _needs(found.name)
        for name, preset in PRESETS.items():
            other = _needs(name)
            special = other <= needs or needs <= other
            if not special and preset.kind in (PRESETS[found.name].kind, want) and fits(row, preset):
                yield Found(name)
        return
    used = found.mapping.messages if found.mapping is not None else _MESSAGES.get(found.name)
    for name in column_names.TURNS if used is not None else ():
        if name in row and name != used and shape_of(row[name]) == "turns":
            yield made(messages=name)


_MESSAGES = {"messages": "messages", "sharegpt": "conversations"}
"""The columns with messages of named formats."""


def _needs(name: str) -> set[str]:
    preset = PRESETS[name]
    return {*preset.marks, *preset.holds}


def _differ(row: Columns, one: Found, other: Found, want: Want) -> bool:
    """Would both formats read the row, with different results? Messages that repeat a part of the others do not count
    as different."""
    first, second = _said(row, one, want), _said(row, other, want)
    if first is None or second is None:
        return False
    if one.name not in PRESETS and set(_texts(second)) <= set(_texts(first)):
        return False
    return bool(first != second)


def _said(row: Columns, found: Found, want: Want) -> list[Any] | None:
    """The contents of a row's records; None when the format cannot read it. A row of a group gives no record by itself:
    for it, the answers and judgements are returned."""
    from align.data.formats.formats import Converter

    convert = Converter(DataSource(path="rows"), want)
    convert.use(found)
    if convert.grouped:
        return [found.name]
    try:
        records = convert(Row(dict(row), Origin("", 1)))
    except RowError:
        return None
    if want == "prompt":
        return [record.prompt for record in records if isinstance(record, Prompt)]
    return [{key: part for key, part in form_of(record).items() if key != "id"} for record in records]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
