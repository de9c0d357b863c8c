"""The parts of a row that a record keeps besides those that its format reads: an id, and other columns."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

from align.data.formats.own_rows import is_own, other_columns
from align.data.formats.personal import impersonal
from align.data.records import Origin
from align.data.strict_json import as_json

FIELDS_LIMIT = 16_384
"""Largest number of characters of JSON for the other columns of a row. Columns are taken in order; one that does not
fit is left out."""

_IDS = ("id", "prompt_id", "conversation_id", "question_id", "uuid", "conversation_hash")


def id_of(value: Mapping[str, Any], origin: Origin) -> tuple[str | None, str]:
    """``(column, id)``; without an id column, the file's name and the line, which are the same on every machine."""
    for key in _IDS:
        item = value.get(key)
        if isinstance(item, (str, int)) and not isinstance(item, bool) and (0 < len(str(item)) <= 200 or is_own(value)):
            return key, str(item)
    return None, f"{_name(origin.source)}:{origin.line}"


@lru_cache(maxsize=64)
def _name(source: str) -> str:
    """The file's name, cached, so that it is not computed for every row."""
    return Path(source).name


def kept(row: Mapping[str, Any], used: Set[str | None]) -> dict[str, Any]:
    """The columns of a row that are not ``used``, as a record keeps them. For a row that this package wrote they are
    the columns of the original row, which are within the limit already."""
    columns = other_columns(row, used)
    found: dict[str, Any] = impersonal(columns) if is_own(row) else bounded(columns)
    return found


def bounded(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as JSON values, up to :data:`FIELDS_LIMIT`, without those about persons."""
    kept: dict[str, Any] = {}
    room = FIELDS_LIMIT
    for key, item in impersonal(dict(columns)).items():
        found = as_json(item)
        if found is not None and item is not None and len(key) + found[1] <= room:
            kept[key] = found[0]
            room -= len(key) + found[1]
    return kept
