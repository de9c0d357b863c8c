"""Columns that a source has and nothing reads, of the kinds that may have been meant: told once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from align.data.formats import column_names
from align.data.strict_json import clip

Row = Mapping[str, Any]


def unread_grades(rows: Iterable[Row], read: set[str]) -> list[str]:
    """Columns that may grade answers which are compared already, and that nothing reads: named once."""
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


def unread_texts(rows: Iterable[Row], read: set[str]) -> list[str]:
    """Columns with long texts that nothing reads: named once, since they may be meant."""
    found: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            if name not in read and isinstance(value, str) and len(value) >= column_names.LONG:
                found.setdefault(clip(name, 40), None)
    return list(found)
