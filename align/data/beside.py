"""What a record keeps of its row beside what its format reads: an id, and other columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.data.personal import impersonal
from align.data.records import Origin
from align.data.strict_json import as_json

FIELDS_LIMIT = 16_384
"""Characters of JSON that a record keeps of its row's other columns, in their order. A column that does not fit is left out whole."""

_IDS = ("id", "prompt_id", "conversation_id", "question_id", "uuid", "conversation_hash")


def id_of(value: Mapping[str, Any], origin: Origin) -> tuple[str | None, str]:
    """``(column, id)``; where no column has one, the file's name and the line, which are the same on every machine."""
    for key in _IDS:
        item = value.get(key)
        if isinstance(item, (str, int)) and not isinstance(item, bool) and 0 < len(str(item)) <= 200:
            return key, str(item)
    return None, f"{Path(origin.source).name}:{origin.line}"


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
